"""Whether a controller is at work, as far as its lease shows."""

from __future__ import annotations

import time

from cloudai.api.fresh import Fresh
from cloudai.store.protocol import FacadeStore, Lease

FRESH = 1.0  # seconds
SILENT = 10.0  # seconds without a renewal after which nobody leads
LEASE = "controller"


class Lead:
    """`problem` is None while one leads, else why nothing is decided. Renewals are timed by this process's own clock."""

    def __init__(self, store: FacadeStore) -> None:
        self._store = store
        self._lease: Lease | None = None
        self._renewed_at = 0.0
        self._problem = Fresh(self._judge, FRESH)

    async def problem(self) -> str | None:
        return await self._problem.get()

    async def _judge(self) -> str | None:
        lease = await self._store.get_lease(LEASE)
        if lease is None or not lease.holder:
            return "nobody leads: accepted tasks wait until a controller runs"
        if lease != self._lease:
            self._lease, self._renewed_at = lease, time.monotonic()
        silent = time.monotonic() - self._renewed_at
        return f"{lease.holder} has not renewed its lead for {silent:.0f} s" if silent > SILENT else None
