"""What a store is. One contract test suite (`tests/store/test_task_store.py`) runs over every implementation.

`TaskStore` is what clients of the API need; the facade serves it and `cloudai.client` implements it over HTTP.
`FacadeStore` adds what the facade itself needs: the API has no revisions, so watching the change log is no client's business.
`Store` adds what the controller and the agents' endpoint need. Everything here is asynchronous and safe to call from many
tasks of one event loop.

Errors: `CloudAIError` from `cloudai.errors`; a store that cannot be reached, written or read raises `unavailable(...)`.
It has done nothing by halves then; of a write whose answer was lost nobody knows whether it was done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cloudai.resources import Run, RunPhase, Task, TaskSpec, TaskStatus, Worker, WorkerState


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An `Idempotency-Key` with the digest of the body it came with: the same pair gives the first answer again."""

    key: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuery:
    """Which tasks a list holds, newest first. `brief`: nobody looks at their commands, which may be long and are left out."""

    status: TaskStatus | None = None
    user_id: str | None = None
    limit: int = 50
    offset: int = 0
    brief: bool = False


@dataclass(frozen=True, slots=True)
class TaskPage:
    """One page of a list and how many tasks match in all."""

    tasks: list[Task]
    total: int


@dataclass(frozen=True, slots=True)
class LogSlice:
    """Bytes of one attempt's log from `offset`; `end` is how many bytes are stored; `complete` when none will follow."""

    data: bytes
    offset: int
    end: int
    complete: bool


class Kind(StrEnum):
    """What a change is about."""

    TASK = "task"
    RUN = "run"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Change:
    """One committed mutation. It carries a key, never the contents: whoever acts on it reads the store again.

    `event` is what happened in one word: the task's new status, the run's new phase, or `registered` / `updated` / `deleted`;
    it serves announcements, not decisions.
    """

    revision: int
    kind: Kind
    key: str
    event: str


class Pruned(Exception):
    """The asked-for revision is no longer in the change log (or never was): list again and watch from there."""


class TaskStore(Protocol):
    """What the documented API offers."""

    async def create_task(self, spec: TaskSpec, idempotency: Idempotency | None = None) -> Task:
        """Store a new queued task; returns once it is durable. IDEMPOTENCY_CONFLICT for a known key with another body."""
        ...

    async def get_task(self, task_id: str) -> Task:
        """TASK_NOT_FOUND where there is none."""
        ...

    async def list_tasks(self, query: TaskQuery) -> TaskPage: ...

    async def cancel_task(self, task_id: str) -> Task:
        """Wish the task's end. A queued task is cancelled in the same transaction, a placed one gets `cancel_requested`.

        Repeating it changes nothing. TASK_FINISHED for a completed or failed task, TASK_NOT_FOUND for an unknown one.
        """
        ...

    async def list_workers(self) -> list[WorkerState]:
        """Every registered worker with what it holds, by id."""
        ...

    async def get_worker(self, worker_id: str) -> WorkerState:
        """WORKER_NOT_FOUND where there is none."""
        ...

    async def totals(self) -> Mapping[TaskStatus, int]:
        """How many tasks have each status: kept, not counted."""
        ...

    async def read_log(self, task_id: str, attempt: int | None, offset: int, limit: int) -> LogSlice:
        """At most `limit` bytes from `offset` of an attempt (None: the latest). Offsets past the end give no bytes.

        TASK_NOT_FOUND, ATTEMPT_NOT_FOUND, or LOGS_REMOVED once retention took them.
        """
        ...

    async def wait_log(self, task_id: str, attempt: int | None, beyond: int, timeout: float) -> None:
        """Return when more than `beyond` bytes may be stored or the attempt may have ended, or after `timeout` seconds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a worker says of one of its runs. Fields left None keep what is stored."""

    task_id: str
    attempt: int
    worker_id: str
    phase: RunPhase
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life, by the server's clock (`at`), with the worker's usage in percent. `lease`: the promise that its agent is
    known to go by now, as Worker has it; None leaves what is stored.
    """

    worker_id: str
    identity: str
    at: int
    ready: bool
    problem: str | None
    cpu_usage: float | None
    memory_usage: float | None
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is active, read at one revision: tasks that are not finished, every worker, live runs, and of placed tasks
    the current run even where it has ended.
    """

    revision: int
    tasks: Mapping[str, Task]
    runs: Mapping[str, Run]
    workers: Mapping[str, Worker]


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads. `epoch` grows with each new holder and fences the writes of the one before; `version` with each renewal."""

    name: str
    holder: str
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Token:
    """A join token: the SHA-256 of it, a note for people, and when it was made (ms)."""

    digest: bytes
    name: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Which groups were applied, and the revisions the commit took: `first` … `last`, none where last < first."""

    applied: list[bool]
    first: int
    last: int
    objects: list[tuple[Task | Run, ...]] = field(default_factory=list)
    """The groups as stored, with their new versions (empty tuple where not applied)."""


class FenceLost(Exception):
    """The writer does not lead any more; nothing of the commit was applied."""


class NameTaken(Exception):
    """Another machine has registered as that worker; nothing was changed."""


class FacadeStore(TaskStore, Protocol):
    """What the facade needs beyond what it offers."""

    @property
    def agents(self) -> Store | None:
        """The side that agents speak to; None where something else runs the containers, and says why a task waits."""
        ...

    @property
    def cluster_id(self) -> str:
        """Made once with the store; labels every container."""
        ...

    async def runs_of_worker(self, worker_id: str) -> list[Run]:
        """The live runs placed on a worker, oldest first; empty for an unknown worker."""
        ...

    def watch(self, since: int | None = None) -> AsyncIterator[Sequence[Change]]:
        """Batches of changes after revision `since` (None: from now on), none of them empty, in order, without gaps, for ever.

        Raises Pruned when `since` is not in the log any more.
        """
        ...

    async def get_tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Those of `task_ids` that exist, finished ones included."""
        ...

    async def get_lease(self, name: str) -> Lease | None: ...

    async def ping(self) -> None:
        """Raises `unavailable` while the store cannot be written (for a database, a full disk included)."""
        ...

    async def close(self) -> None: ...


class Store(FacadeStore, Protocol):
    """What the controller and the agents' endpoint need beyond the API."""

    # -- the controller's side

    async def snapshot(self) -> Snapshot: ...

    async def get_runs(self, run_ids: Sequence[str]) -> dict[str, Run]: ...

    async def list_runs(self, task_id: str) -> list[Run]:
        """Every attempt of a task, first to last."""
        ...

    async def get_workers(self, worker_ids: Sequence[str] | None = None) -> dict[str, Worker]:
        """Workers without their allocation; None gives all."""
        ...

    async def commit(self, groups: Sequence[Sequence[Task | Run]], fence: Lease | None = None) -> Committed:
        """Apply each group as a whole or not at all.

        An object of version 0 is inserted (refused where its key exists), any other replaces the stored object of exactly
        that version. Raises FenceLost when `fence` is given and no longer the current holder and epoch.
        """
        ...

    async def put_lease(self, lease: Lease, expected_version: int) -> bool:
        """Store `lease` (its version becomes expected_version + 1) where the stored version is still `expected_version`

        (0: no lease stored). False when somebody was faster.
        """
        ...

    async def delete_logs(self, before: int, limit: int) -> int:
        """Remove logs of tasks that finished before `before`, as much as is soon done; reading them is LOGS_REMOVED then.

        Returns of how many tasks, at most `limit`; the last one's may go on to be removed by the next call. 0: none is left.
        """
        ...

    async def delete_finished(self, before: int, limit: int) -> int:
        """Delete up to `limit` tasks that finished before `before` and whose logs were removed, with runs. Returns how many."""
        ...

    async def delete_workers(self, before: int) -> int:
        """Forget workers that were heard of last before `before` and have no live run. Returns how many."""
        ...

    async def prune_changes(self, keep: int) -> int:
        """Remove changes that are older than the last `keep`, as many as is soon done. Returns how many; 0: none is left."""
        ...

    # -- the agents' side

    async def register_worker(self, worker: Worker, replaces: str | None = None) -> Worker:
        """Insert a worker or replace one of the same identity, or of the identity `replaces`; else raises NameTaken.

        `registered_at` of a known one is kept.
        """
        ...

    async def record_heartbeats(self, beats: Sequence[Heartbeat]) -> set[tuple[str, str]]:
        """One transaction for all; appends a change only where `ready` or `problem` changed.

        Returns the `worker_id` and `identity` of those that are known; nothing is stored of others: their name is another
        machine's, or was forgotten.
        """
        ...

    async def report_run(self, report: RunReport) -> Run | None:
        """Store a worker's report where the table of transitions allows it; otherwise change nothing.

        Returns the run as it is stored now; None where there is no such run of that worker.
        """
        ...

    async def append_log(self, run_id: str, offset: int, data: bytes) -> int:
        """Append `data`, which starts at `offset` of the attempt's log; returns how many bytes are durable now.

        A piece that is stored already is not stored again; one that would leave a gap is not stored.
        """
        ...

    async def log_ends(self, run_ids: Sequence[str]) -> dict[str, int]:
        """How many bytes of each attempt's log are durable."""
        ...

    # -- join tokens

    async def add_token(self, digest: bytes, name: str) -> None: ...

    async def has_token(self, digest: bytes) -> bool: ...

    async def list_tokens(self) -> list[Token]:
        """All of them, the oldest first."""
        ...

    async def remove_token(self, digest: bytes) -> bool:
        """Whether it was there."""
        ...
