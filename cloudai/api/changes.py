"""One follower of the change log for all of the API's listeners: held-back answers and telemetry.

A listener only wakes and reads the store again. A break in the log wakes everybody, so that a lost change costs a read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from cloudai.errors import CloudAIError
from cloudai.store.protocol import Change, FacadeStore, Kind, Pruned

logger = logging.getLogger(__name__)

Listener = Callable[[Sequence[Change] | None], None]
PAUSE = 1.0  # seconds between tries while the store cannot be followed


class Changes:
    """`run()` follows the store; everything else only listens."""

    def __init__(self, store: FacadeStore) -> None:
        self._store = store
        self._listeners: set[Listener] = set()
        self._awaited: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.ended = asyncio.Event()  # nobody is to wait any more: the API stops

    async def run(self) -> None:
        since: int | None = None
        while True:
            try:
                async for batch in self._store.watch(since):
                    self._tell(batch)
                    since = batch[-1].revision
            except Pruned:
                since = None
            except CloudAIError as error:
                logger.warning("cannot follow the store, trying again: %s", error)
                await asyncio.sleep(PAUSE)
            except Exception:
                logger.exception("a fault while following the store, trying again")
                await asyncio.sleep(PAUSE)
            self._tell(None)

    def _tell(self, batch: Sequence[Change] | None) -> None:
        for listener in list(self._listeners):
            listener(batch)
        if not self._awaited:
            return
        keys = list(self._awaited) if batch is None else [change.key for change in batch if change.kind is Kind.TASK]
        for key in keys:
            for event in self._awaited.get(key, ()):
                event.set()

    def end(self) -> None:
        """Let go of all who wait for a change."""
        self.ended.set()
        for events in self._awaited.values():
            for event in events:
                event.set()

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Calls `listener` with each batch (None: changes may have been missed) until the block ends."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    @contextlib.contextmanager
    def of_task(self, task_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the task may have changed. Enter it before reading the task."""
        event = asyncio.Event()
        self._awaited[task_id].add(event)
        try:
            yield event
        finally:
            events = self._awaited[task_id]
            events.discard(event)
            if not events:
                del self._awaited[task_id]
