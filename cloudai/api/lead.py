"""Whether a controller is at work, as far as its lease shows."""

from __future__ import annotations

import asyncio
import contextlib
import time

from cloudai.api.fresh import Fresh
from cloudai.errors import CloudAIError
from cloudai.store.protocol import FacadeStore, Lease

FRESH = 1.0  # seconds
LOOK_SECONDS = 3.0  # how often it is looked at though nobody asks
SILENT = 10.0  # seconds without a renewal after which nobody leads
LEASE = "controller"


class Lead:
    """`problem` is None while one leads, else why nothing is decided. Renewals are timed by this process's own clock, so they
    are followed by `run`: who asked only now and then could not tell an old lease from one that was just renewed. `known` is
    the problem as `run` saw it last, for whoever must not wait for the store.
    """

    def __init__(self, store: FacadeStore) -> None:
        self._store = store
        self._lease: Lease | None = None
        self._renewed_at = 0.0
        self.known: str | None = None
        self._problem = Fresh(self._judge, FRESH)
        self._asked_now = Fresh(self._judge, 0.0)  # by all who ask at the same time

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(CloudAIError):  # whoever asks is told
                self.known = await self.problem()
            await asyncio.sleep(LOOK_SECONDS)

    async def problem(self) -> str | None:
        """That one leads is believed for a moment; that none does is asked anew. Raises where the store does not answer."""
        return await self._problem.get() and await self._asked_now.get()

    async def _judge(self) -> str | None:
        lease = await self._store.get_lease(LEASE)
        if lease is None or not lease.holder:
            return "nobody leads: accepted tasks wait until a controller runs"
        if lease != self._lease:
            self._lease, self._renewed_at = lease, time.monotonic()
        silent = time.monotonic() - self._renewed_at > SILENT
        return f"{lease.holder} has not renewed its lead for more than {SILENT:g} s" if silent else None
