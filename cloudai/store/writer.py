"""The one thread that writes. What has gathered in the event loop while the last commit was under way shares the next one.
A caller hears of its operation only after the commit that holds it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Engine

from cloudai.errors import unavailable
from cloudai.store.engine import Vanished, translated
from cloudai.store.transaction import Transaction

log = logging.getLogger("cloudai.store")

MAX_BATCH = 512
DELAY_SECONDS = 0.002  # the longest that an operation waits for others to share its commit
P = TypeVar("P")
R = TypeVar("R")

# Applies many operations of one kind in a transaction. An outcome that is an exception refuses that operation alone; it
# must not have written anything.
Apply = Callable[[Transaction, Sequence[P]], Sequence[R | Exception]]


@dataclass(frozen=True, slots=True)
class _Operation:
    apply: Apply[Any, Any]
    payload: Any
    future: asyncio.Future[Any]


class Writer:
    """Belongs to the event loop that runs when it is made, except `_commit` and what that calls.

    `committed` is called in the writer's thread after each commit that changed something.
    """

    def __init__(self, engine: Engine, file: Path | None, committed: Callable[[Transaction], None]) -> None:
        self._engine = engine
        self._file = file
        self._inode = _inode(file)
        self._committed = committed
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Operation] = []
        self.committing = False
        self.session: int | None = None  # PostgreSQL's number of the connection that commits
        self._company = 1  # operations that were under way when the last commit ended
        self._late: asyncio.TimerHandle | None = None
        self._closed: asyncio.Event | None = None
        self._batches: SimpleQueue[list[_Operation] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    async def write(self, apply: Apply[P, R], payload: P) -> R:
        """The operation's outcome, once durable; raises what refused it, or `unavailable`."""
        if self._closed:
            raise unavailable("the store is closed")
        future: asyncio.Future[R] = self._loop.create_future()
        self._waiting.append(_Operation(apply, payload, future))
        if not self.committing:
            self._begin_with_company()
        return await future

    async def close(self) -> None:
        """Commit what waits and end the thread."""
        if self._closed is None:
            self._closed = asyncio.Event()
            if not self.committing:
                self._begin()
            await self._closed.wait()
            await asyncio.to_thread(self._thread.join)
            self._engine.dispose()

    # -- in the event loop

    def _begin_with_company(self) -> None:
        """Give those who were just answered a moment to ask again, where there are many: one commit then serves all.

        PostgreSQL's commit_delay with commit_siblings, except that the number of siblings is the one seen last.
        """
        if len(self._waiting) >= self._company or self._closed:
            self._begin()
        elif self._waiting and self._late is None:
            self._late = self._loop.call_later(DELAY_SECONDS, self._begin)

    def _begin(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None
        if self._waiting:
            self.committing = True
            self._batches.put(self._waiting[:MAX_BATCH])
            del self._waiting[:MAX_BATCH]
        elif self._closed:
            self._batches.put(None)
            self._closed.set()

    def _answer(self, batch: list[_Operation], outcomes: list[Any]) -> None:
        self.committing = False
        self._company = min(MAX_BATCH, len(batch) + len(self._waiting))
        for operation, outcome in zip(batch, outcomes, strict=True):
            if operation.future.done():
                continue
            if isinstance(outcome, Exception):
                operation.future.set_exception(outcome)
            else:
                operation.future.set_result(outcome)
        self._begin_with_company()

    # -- in the thread

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            outcomes = self._outcomes(batch)
            try:
                self._loop.call_soon_threadsafe(self._answer, batch, outcomes)
            except RuntimeError:  # the event loop has ended; nobody waits any more
                log.debug("the event loop ended before its writes were answered")
                return

    def _outcomes(self, batch: list[_Operation]) -> list[Any]:
        try:
            return self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the callers, and the thread goes on
            refusal = translated(error)
            if refusal is not None:
                log.warning("the store cannot be written: %s", refusal)
                self._engine.dispose()  # the next batch connects anew
                return [refusal] * len(batch)
            if len(batch) == 1:
                return [error]
            # A mistake in one operation must not refuse those that happened to share its commit.
            return [outcome for operation in batch for outcome in self._outcomes([operation])]

    def _commit(self, batch: list[_Operation]) -> list[Any]:
        kinds: dict[Apply[Any, Any], list[int]] = {}
        for index, operation in enumerate(batch):
            kinds.setdefault(operation.apply, []).append(index)
        outcomes: list[Any] = [None] * len(batch)
        self._same_file()
        with self._engine.begin() as connection:
            transaction = Transaction(connection)
            self.session = transaction.session
            for apply, indices in kinds.items():
                results = apply(transaction, [batch[index].payload for index in indices])
                for index, result in zip(indices, results, strict=True):
                    outcomes[index] = result
            transaction.finish()
            self._same_file()
        if transaction.changes or transaction.logs:
            self._committed(transaction)
        return outcomes

    def _same_file(self) -> None:
        # SQLite goes on writing to a file that was deleted; nobody would ever read that again.
        if self._file and _inode(self._file) != self._inode:
            raise Vanished(f"the database file {self._file} was removed or replaced; put it back or restart")


def _inode(file: Path | None) -> int | None:
    if file is None:
        return None
    try:
        return os.stat(file).st_ino
    except FileNotFoundError:
        return None
