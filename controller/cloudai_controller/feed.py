"""Keys of what changed in the store, gathered in the background. A key says where to look, never what to do."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from cloudai.store.protocol import Committed, Kind, Store


@dataclass(frozen=True, slots=True)
class Keys:
    tasks: list[str]
    runs: list[str]
    workers: list[str]


class Feed:
    """Follows the change log after revision `since`; `wake` is set when there is something to take."""

    def __init__(self, store: Store, since: int, wake: asyncio.Event) -> None:
        self._seen = since
        self._wake = wake
        self._keys: dict[tuple[Kind, str], int] = {}  # → the last revision that changed it
        self._own: deque[tuple[int, int]] = deque()
        self._following = asyncio.create_task(self._follow(store, since))
        self._following.add_done_callback(lambda _: wake.set())

    async def _follow(self, store: Store, since: int) -> None:
        async for changes in store.watch(since):
            for change in changes:
                self._keys[change.kind, change.key] = change.revision
            if changes:
                self._seen = changes[-1].revision
                self._wake.set()

    def own(self, committed: Committed) -> None:
        """These changes were made here and are known."""
        if committed.last >= committed.first:
            self._own.append((committed.first, committed.last))

    def take(self) -> Keys:
        """What changed since the last call, without one's own changes. Raises what ended the watch (such as Pruned)."""
        if self._following.done():
            self._following.result()
            raise ConnectionError("the store ended the watch")
        gathered, self._keys = self._keys, {}
        keys = Keys([], [], [])
        places = {Kind.TASK: keys.tasks, Kind.RUN: keys.runs, Kind.WORKER: keys.workers}
        for (kind, key), revision in gathered.items():
            if not any(first <= revision <= last for first, last in self._own):
                places[kind].append(key)
        while self._own and self._own[0][1] <= self._seen:
            self._own.popleft()
        return keys

    async def close(self) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
