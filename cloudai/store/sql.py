"""The store over SQLite or PostgreSQL: reads in a few threads, writes through the one writer (writer.py)."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine

from cloudai.errors import CloudAIError, Code, task_not_found, unavailable
from cloudai.resources import Run, Task, TaskSpec, TaskStatus, Worker, WorkerState
from cloudai.store import commit, reading, rows, submit, upkeep, worker_writes
from cloudai.store.engine import READERS, normal_url, reading_engine, sqlite_file, translated, writing_engine
from cloudai.store.migrate import migrate
from cloudai.store.near import MOST, NearReader
from cloudai.store.protocol import (
    Change,
    Committed,
    Heartbeat,
    Idempotency,
    Lease,
    LogSlice,
    Pruned,
    RunReport,
    Snapshot,
    TaskPage,
    TaskQuery,
    Token,
)
from cloudai.store.signals import REPAIR_SECONDS, Signals, Source, SqlitePoll
from cloudai.store.transaction import Transaction
from cloudai.store.writer import Writer

Clock = Callable[[], int]
P = ParamSpec("P")
T = TypeVar("T")
WATCH_BATCH = 2000
TURN_SECONDS = 10.0  # how long a read may wait for a thread


async def open_store(url: str, *, clock: Clock = time.time_ns) -> SqlStore:
    """Open (and where needed make or migrate) the database at `url`. `clock`: ns since the epoch.

    Raises ValueError for a URL of another kind, `unavailable` where the database cannot be reached, SchemaTooNew where a
    newer CloudAI has used it.
    """
    url = normal_url(url)
    try:
        await asyncio.to_thread(migrate, url)
        store = SqlStore(url, clock)
        await store.start()
    except Exception as error:
        raise translated(error) or error from error
    return store


class SqlStore:
    """Implements `Store`. Made by open_store."""

    def __init__(self, url: str, clock: Clock) -> None:
        file = sqlite_file(url)
        self._clock = clock
        self._signals = Signals()
        self._looking = asyncio.Lock()
        self._reads: Engine = reading_engine(url)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._writer = Writer(writing_engine(url), file, self._committed)
        self._near: NearReader | None = None
        self._file = file
        self._closed = False
        self._points: dict[int, asyncio.Future[Task | None]] = {}
        self._point_reader: asyncio.Task[None] | None = None
        self._source = _source(url, self._signals, self._writer)
        self.cluster_id = ""

    @property
    def agents(self) -> SqlStore:
        return self

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.cluster_id = await self._read(reading.cluster_id)
        if self._file:
            self._near = NearReader(self._file)
        self._source.start()

    async def close(self) -> None:
        self._closed = True
        self._source.close()
        if self._near:
            self._near.close()
            self._near = None
        await self._writer.close()
        if self._point_reader:
            await self._point_reader
        await asyncio.to_thread(self._readers.shutdown)
        self._reads.dispose()

    # -- how reads and commits happen

    async def _read(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._closed:
            raise unavailable("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, self._query, time.monotonic(), lambda connection: query(connection, *args, **kwargs)
        )

    def _nearby(self, query: Callable[Concatenate[NearReader, P], T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The answer of a small query at once; None where the threads have to be asked."""
        if self._near is not None:
            with contextlib.suppress(sqlite3.Error):
                return query(self._near, *args, **kwargs)
        return None

    def _query(self, asked: float, query: Callable[[Connection], T]) -> T:
        # Where each read in the queue found out for itself that nobody answers, the last ones would wait for minutes.
        if time.monotonic() - asked > TURN_SECONDS:
            raise unavailable("the database does not answer those who asked before")
        try:
            with self._reads.begin() as connection:
                return query(connection)
        except Exception as error:
            refusal = translated(error)
            if refusal is not None and refusal is not error:
                raise refusal from error
            raise

    def _committed(self, transaction: Transaction) -> None:
        self._loop.call_soon_threadsafe(self._signals.committed, transaction.changes, transaction.logs)

    def _now(self) -> int:
        return self._clock() // 1_000_000

    # -- TaskStore

    async def create_task(self, spec: TaskSpec, idempotency: Idempotency | None = None) -> Task:
        return await self._writer.write(submit.submit, submit.Submit(spec, idempotency, self._clock()))

    async def get_task(self, task_id: str) -> Task:
        key = rows.task_key(task_id)
        if self._near is not None:
            with contextlib.suppress(sqlite3.Error):
                if (task := self._near.task(key)) is not None:
                    return task
                raise task_not_found(task_id)
        task = await self._shared_point(key)
        if task is None:
            raise task_not_found(task_id)
        return task

    async def _shared_point(self, key: int) -> Task | None:
        """Requests that come while a read is under way share the next one."""
        future = self._points.get(key)
        if future is None:
            future = self._points[key] = asyncio.get_running_loop().create_future()
            if self._point_reader is None:
                self._point_reader = asyncio.create_task(self._read_points())
        return await asyncio.shield(future)

    async def _read_points(self) -> None:
        while self._points:
            points, self._points = self._points, {}
            try:
                found = await self._read(reading.tasks_by_key, list(points))
            except Exception as error:  # noqa: BLE001 - it belongs to those who asked
                for future in points.values():
                    future.set_exception(error)
                    future.exception()  # each asker raises it; one that left must not be reported
                continue
            for key, future in points.items():
                future.set_result(found.get(key))
        self._point_reader = None

    async def list_tasks(self, query: TaskQuery) -> TaskPage:
        return await self._read(reading.task_page, query)

    async def cancel_task(self, task_id: str) -> Task:
        rows.task_key(task_id)
        return await self._writer.write(submit.cancel, submit.Cancel(task_id, self._now()))

    async def list_workers(self) -> list[WorkerState]:
        return await self._read(reading.worker_states)

    async def get_worker(self, worker_id: str) -> WorkerState:
        found = await self._read(reading.worker_states, worker_id)
        if not found:
            raise CloudAIError(Code.WORKER_NOT_FOUND, "Worker not found", {"worker_id": worker_id})
        return found[0]

    async def totals(self) -> Mapping[TaskStatus, int]:
        return await self._read(reading.totals)

    async def read_log(self, task_id: str, attempt: int | None, offset: int, limit: int) -> LogSlice:
        return await self._read(reading.read_log, task_id, attempt, offset, limit)

    async def wait_log(self, task_id: str, attempt: int | None, beyond: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            signal = asyncio.ensure_future(self._signals.log(task_id, min(left, REPAIR_SECONDS)))
            await asyncio.sleep(0)  # listen first, look second: what comes in between is heard
            try:
                now = await self.read_log(task_id, attempt, beyond, 0)
                if now.end > beyond or now.complete:
                    return
                await signal
            finally:
                signal.cancel()

    # -- what the facade needs

    async def runs_of_worker(self, worker_id: str) -> list[Run]:
        return await self._read(reading.runs_of_worker, worker_id)

    async def watch(self, since: int | None = None) -> AsyncIterator[Sequence[Change]]:
        revision = await self._read(reading.revision) if since is None else since
        while True:
            told = self._signals.told  # before it looks: what comes meanwhile is a reason to look again
            known = self._signals.after(revision)
            batch = known or await self._look(revision, known=known is not None)
            if batch:
                revision = batch[-1].revision
                yield batch
            elif not await self._signals.change(told, REPAIR_SECONDS):
                self._signals.foreign()  # a signal may have been lost

    async def _look(self, revision: int, *, known: bool) -> Sequence[Change]:
        """What changed after `revision`, for all watchers. `known`: nothing unless another process wrote."""
        async with self._looking:
            if news := self._signals.after(revision):
                return news
            others = self._signals.others
            if known and others == self._signals.looked:
                return []
            found = self._nearby(NearReader.changes, revision, MOST)
            if found is None:
                found = await self._read(reading.changes, revision, WATCH_BATCH)
            newest, batch = found
            if newest < revision or (newest > revision and (not batch or batch[0].revision != revision + 1)):
                raise Pruned(f"revision {revision} is not in the change log")
            self._signals.learned(batch)
            if newest in (revision, *(change.revision for change in batch[-1:])):
                self._signals.looked = others
            return batch

    # -- the controller's side

    async def snapshot(self) -> Snapshot:
        return await self._read(reading.snapshot)

    async def get_tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        keys = [rows.task_key(task_id) for task_id in task_ids]
        found = self._nearby(NearReader.tasks, keys) if len(keys) <= MOST else None
        if found is None:
            found = await self._read(reading.tasks_by_key, keys)
        return {task.task_id: task for task in found.values()}

    async def get_runs(self, run_ids: Sequence[str]) -> dict[str, Run]:
        keys = [rows.run_key(run_id) for run_id in run_ids]
        found = self._nearby(NearReader.runs, keys) if len(keys) <= MOST else None
        return await self._read(reading.runs_by_key, keys) if found is None else found

    async def list_runs(self, task_id: str) -> list[Run]:
        return await self._read(reading.runs_of_task, rows.task_key(task_id))

    async def get_workers(self, worker_ids: Sequence[str] | None = None) -> dict[str, Worker]:
        return await self._read(reading.workers, worker_ids)

    async def commit(self, groups: Sequence[Sequence[Task | Run]], fence: Lease | None = None) -> Committed:
        return await self._writer.write(commit.commit, commit.Commit(groups, fence))

    async def get_lease(self, name: str) -> Lease | None:
        found = self._nearby(NearReader.leases, name)
        return await self._read(reading.lease, name) if found is None else next(iter(found), None)

    async def put_lease(self, lease: Lease, expected_version: int) -> bool:
        return await self._writer.write(upkeep.put_lease, upkeep.PutLease(lease, expected_version))

    async def delete_finished(self, before: int, limit: int) -> int:
        return await self._writer.write(upkeep.delete_finished, upkeep.Finished(before, limit))

    async def delete_logs(self, before: int, limit: int) -> int:
        return await self._writer.write(upkeep.delete_logs, upkeep.Finished(before, limit))

    async def delete_workers(self, before: int) -> int:
        return await self._writer.write(upkeep.delete_workers, before)

    async def prune_changes(self, keep: int) -> int:
        return await self._writer.write(upkeep.prune_changes, keep)

    # -- the agents' side

    async def register_worker(self, worker: Worker, replaces: str | None = None) -> Worker:
        return await self._writer.write(worker_writes.register, worker_writes.Registration(worker, replaces))

    async def record_heartbeats(self, beats: Sequence[Heartbeat]) -> set[tuple[str, str]]:
        return await self._writer.write(worker_writes.heartbeats, beats)

    async def report_run(self, report: RunReport) -> Run | None:
        rows.task_key(report.task_id)
        return await self._writer.write(worker_writes.report, report)

    async def append_log(self, run_id: str, offset: int, data: bytes) -> int:
        rows.run_key(run_id)
        return await self._writer.write(worker_writes.append_log, worker_writes.LogPiece(run_id, offset, data))

    async def log_ends(self, run_ids: Sequence[str]) -> dict[str, int]:
        return await self._read(reading.log_ends, [rows.run_key(run_id) for run_id in run_ids])

    # -- tokens, health

    async def add_token(self, digest: bytes, name: str) -> None:
        await self._writer.write(upkeep.add_token, Token(digest, name, self._now()))

    async def has_token(self, digest: bytes) -> bool:
        return await self._read(reading.has_token, digest)

    async def list_tokens(self) -> list[Token]:
        return await self._read(reading.tokens)

    async def remove_token(self, digest: bytes) -> bool:
        return await self._writer.write(upkeep.remove_token, digest)

    async def ping(self) -> None:
        await self._writer.write(upkeep.touch, self._now())


def _source(url: str, signals: Signals, writer: Writer) -> Source:
    file = sqlite_file(url)
    if file is not None:
        return SqlitePoll(file, signals.foreign, lambda: writer.committing)
    from cloudai.store.listen import PostgresListener  # its library comes with the extra `postgres` only

    return PostgresListener(url, signals, lambda: writer.session)
