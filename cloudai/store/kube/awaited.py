"""Who waits for news of a Task or of its Pods."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator


class Awaited:
    """Events by the Task's name."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def wake(self, task: str) -> None:
        """Something is new."""
        for event in self._events.get(task, ()):
            event.set()

    @contextlib.contextmanager
    def of(self, task: str) -> Iterator[asyncio.Event]:
        """An event that is set by the next news. Enter it before reading what is known."""
        event = asyncio.Event()
        self._events[task].add(event)
        try:
            yield event
        finally:
            self._events[task].discard(event)
            if not self._events[task]:
                del self._events[task]
