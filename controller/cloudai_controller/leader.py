"""One leader among several controllers, by a lease in the store.

No two clocks are compared: a candidate takes over when it has itself seen the same lease unrenewed for TAKEOVER_SECONDS.
That the old leader may still believe in itself does no harm, since every commit of a controller is fenced by its epoch.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from cloudai.store.protocol import Lease, Store
from cloudai_controller.clock import Clock
from cloudai_controller.metrics import LEADING

NAME = "controller"
RENEW_SECONDS = 1.0
TAKEOVER_SECONDS = 5.0

log = logging.getLogger("cloudai.controller")


class Leadership:
    """`lease` is what this process holds, None while another one leads."""

    def __init__(self, store: Store, holder: str, clock: Clock) -> None:
        self._store = store
        self._holder = holder
        self._clock = clock
        self._seen: Lease | None = None
        self._seen_at = 0.0
        self._renewed_at = 0.0
        self._turn = asyncio.Lock()  # renewals come from a pass and from a timer; one at a time is enough
        self.lease: Lease | None = None

    async def tick(self) -> bool:
        """Renew the lease when it is time, or take it over when it is free. True when this process leads."""
        async with self._turn:
            if self.lease is None:
                await self._apply()
            elif self._clock.elapsed() - self._renewed_at >= RENEW_SECONDS:
                await self._put(self.lease)
            return self.lease is not None

    def lost(self) -> None:
        """The store says that somebody else leads."""
        if self.lease is not None:
            log.warning("another controller leads now; this one waits")
        self.lease = None
        LEADING.set(0)

    async def release(self) -> None:
        """Let the next controller take over at once."""
        async with self._turn:
            held, self.lease = self.lease, None
            LEADING.set(0)
            if held is not None:
                await self._store.put_lease(replace(held, holder=""), held.version)

    async def _apply(self) -> None:
        seen = await self._store.get_lease(NAME)
        if seen is None:
            await self._put(Lease(NAME, self._holder, 1, 0))
        elif seen.holder == self._holder:
            await self._put(seen)  # a renewal of ours whose answer was lost
        elif seen.holder == "" or self._silent(seen):
            await self._put(replace(seen, holder=self._holder, epoch=seen.epoch + 1))

    def _silent(self, seen: Lease) -> bool:
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock.elapsed()
        return self._clock.elapsed() - self._seen_at >= TAKEOVER_SECONDS

    async def _put(self, lease: Lease) -> None:
        at = self._clock.elapsed()
        if not await self._store.put_lease(lease, lease.version):
            self.lost()
            return
        if self.lease is None:
            log.info("this controller leads now", extra={"epoch": lease.epoch})
            LEADING.set(1)
        self.lease = replace(lease, version=lease.version + 1)
        self._renewed_at = at
