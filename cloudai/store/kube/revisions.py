"""The changes that this process has seen, in order: what wakes those who follow the store.

A revision here is a count of this process; who missed too many is told so and reads again, as with every store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from cloudai.store.protocol import Change, Kind, Pruned

KEPT = 10_000


class Revisions:
    """The last changes, and whoever waits for the next."""

    def __init__(self) -> None:
        self._changes: deque[Change] = deque(maxlen=KEPT)
        self._last = 0
        self._more = asyncio.Event()

    def add(self, kind: Kind, key: str, event: str) -> None:
        """Tell of a change: what `event` became of the `kind` named `key`."""
        self._last += 1
        self._changes.append(Change(self._last, kind, key, event))
        self._more.set()
        self._more = asyncio.Event()

    async def after(self, since: int | None) -> AsyncIterator[Sequence[Change]]:
        """Batches after `since` (None: from now on), for ever. Raises Pruned where they are not all known."""
        seen = self._last if since is None else since
        if seen > self._last:
            raise Pruned
        while True:
            more = self._more
            missed = self._last - seen
            if missed > len(self._changes):
                raise Pruned
            if missed:
                batch = [self._changes[index] for index in range(len(self._changes) - missed, len(self._changes))]
                seen = self._last
                yield batch
                continue
            await more.wait()
