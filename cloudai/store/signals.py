"""How a watcher learns that the store changed: at once from this process's own commits, soon from another's.

A signal carries no contents. Own commits, and what one watcher has read of others', are kept for a while, so that the
watchers of a process need not each ask the database.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from cloudai.store.engine import file_uri
from cloudai.store.protocol import Change

REPAIR_SECONDS = 1.0  # how long a lost signal may go unnoticed
POLL_SECONDS = 0.005  # how often SQLite is asked whether another process wrote
KEPT = 10_000  # changes kept in memory
REVISION = "SELECT value FROM counters WHERE name = 'revision'"


class Source(Protocol):
    """Tells of commits of other processes, from `start` until `close`."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class Signals:
    """Wakes who waits for a revision or for a task's log. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._recent: deque[Change] = deque(maxlen=KEPT)
        self.others = 0  # how often another process may have written
        self.looked = -1  # `others` before the database was last asked for everything
        self.told = 0  # how often those who wait for any change were woken
        self._any: set[asyncio.Future[None]] = set()
        self._logs: dict[str, set[asyncio.Future[None]]] = {}

    def committed(self, changes: Sequence[Change], task_ids: Collection[str]) -> None:
        """This process committed these changes, and bytes to the logs of these tasks."""
        if changes:
            self.learned(changes)
            self._tell()
        self.logged(task_ids)

    def logged(self, task_ids: Iterable[str]) -> None:
        """The logs of these tasks grew."""
        if self._logs:
            for task_id in task_ids:
                _wake(self._logs.get(task_id, ()))

    def learned(self, changes: Sequence[Change]) -> None:
        """These changes, which follow each other, are known now."""
        recent = self._recent
        news = [change for change in changes if not recent or change.revision > recent[-1].revision]
        if news and recent and recent[-1].revision + 1 != news[0].revision:
            recent.clear()  # what another process wrote in between is not known
        recent.extend(news)
        # A run's key begins with its task's: an attempt that ends completes a log.
        self.logged(key for change in news for key in (change.key, change.key.rpartition("-")[0]))

    def foreign(self, revision: int | None = None) -> None:
        """Another process may have made any change; `revision` is the newest, where that is known.

        Whose logs it wrote is told by `logged`, where that is known, else seen by the repair pass of those who wait for one.
        """
        if revision is None or not self._recent or self._recent[-1].revision != revision:
            self.others += 1
            self._tell()

    def _tell(self) -> None:
        self.told += 1
        _wake(self._any)

    def after(self, revision: int) -> list[Change] | None:
        """What is known to have changed after `revision`; None where memory does not reach back to it."""
        recent = self._recent
        if not recent or not recent[0].revision <= revision + 1 <= recent[-1].revision + 1:
            return None
        skip = revision + 1 - recent[0].revision
        return [recent[index] for index in range(skip, len(recent))]

    async def change(self, told: int, timeout: float) -> bool:
        """Wait until something changed since `told` was read, at most `timeout` seconds; False when the time was over."""
        return self.told != told or await _wait(self._any, timeout)

    async def log(self, task_id: str, timeout: float) -> None:
        """Wait until a task or its log may have changed, at most `timeout` seconds."""
        waiting = self._logs.setdefault(task_id, set())
        try:
            await _wait(waiting, timeout)
        finally:
            if not waiting:
                self._logs.pop(task_id, None)


def _wake(waiting: Iterable[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


async def _wait(waiting: set[asyncio.Future[None]], timeout: float) -> bool:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting.add(future)
    try:
        await asyncio.wait([future], timeout=timeout)
        return future.done()
    finally:
        waiting.discard(future)


class SqlitePoll:
    """Asks SQLite for `PRAGMA data_version`, which another connection's commit changes: a look at shared memory.

    This process's own commits change it too. The revision tells whose it was, unless one of our own is under way
    (`committing`): then the next look tells, or the gap that another's commit leaves between two of ours.
    """

    def __init__(self, file: Path, changed: Callable[[int | None], None], committing: Callable[[], bool]) -> None:
        self._file = file
        self._changed = changed
        self._committing = committing
        self._connection: sqlite3.Connection | None = None
        self._version: object = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._connection:
            self._connection.close()

    def _tick(self) -> None:
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(f"{file_uri(self._file)}?mode=ro", uri=True, timeout=0)
            version = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                if self._committing():
                    version = self._version
                else:
                    self._changed(self._connection.execute(REVISION).fetchone()[0])
        except sqlite3.Error:
            version = None  # the repair pass of every waiter covers what is missed
        self._version = version
        self._timer = self._loop.call_later(POLL_SECONDS, self._tick)
