"""Any sequence of operations leaves the store as a plain model says."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cloudai.errors import CloudAIError, Code
from cloudai.resources import RUN_TRANSITIONS, TASK_TRANSITIONS, RunPhase, Task, TaskStatus
from cloudai.store.protocol import Change, Idempotency, TaskQuery
from cloudai.store.sql import SqlStore, open_store
from tests.engines.postgres import Postgres
from tests.store.values import SPEC, placing, report

USERS = ("ann", "ben")
PICK = st.integers(0, 1_000_000)  # which of those there are
PHASES = st.sampled_from([phase for phase in RunPhase if phase is not RunPhase.ASSIGNED])


class Machine(RuleBasedStateMachine):
    """The model: every task as it was last seen, and what is known of each run."""

    urls: ClassVar[itertools.chain[str]]  # databases to take, each empty

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.url = next(type(self).urls)
        self.store: SqlStore = self.runner.run(open_store(self.url))
        self.tasks: dict[str, Task] = {}
        self.phases: dict[str, RunPhase] = {}
        self.logs: dict[str, bytes] = {}
        self.keys: dict[str, str] = {}
        self.clock = 1000

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def pick(self, number: int) -> Task:
        return list(self.tasks.values())[number % len(self.tasks)]

    def has_tasks(self) -> bool:
        return bool(self.tasks)

    # -- what may happen

    @rule(user=st.sampled_from(USERS), key=st.none() | st.sampled_from(["a", "b"]))
    def submit(self, user: str, key: str | None) -> None:
        spec = replace(SPEC, user_id=user)
        work = self.store.create_task(spec, Idempotency(key, user.encode()) if key else None)
        first = self.tasks.get(self.keys.get(key or "", ""))
        if first is not None and first.spec.user_id != user:
            with pytest.raises(CloudAIError) as caught:
                self.runner.run(work)
            assert caught.value.code is Code.IDEMPOTENCY_CONFLICT
            return
        task = self.runner.run(work)
        if first is not None:
            assert task == first
            return
        assert task.task_id not in self.tasks
        self.tasks[task.task_id] = task
        if key:
            self.keys[key] = task.task_id

    @precondition(has_tasks)
    @rule(number=PICK)
    def cancel(self, number: int) -> None:
        before = self.pick(number)
        work = self.store.cancel_task(before.task_id)
        if before.status in (TaskStatus.COMPLETED, TaskStatus.FAILED):
            with pytest.raises(CloudAIError) as caught:
                self.runner.run(work)
            assert caught.value.code is Code.TASK_FINISHED
            return
        after = self.runner.run(work)
        assert after.cancel_requested
        assert (after.status is TaskStatus.CANCELLED) == (before.status in (TaskStatus.QUEUED, TaskStatus.CANCELLED))
        assert (after == before) == (before.cancel_requested)
        self.tasks[after.task_id] = after

    @precondition(has_tasks)
    @rule(number=PICK, stale=st.booleans())
    def place(self, number: int, stale: bool) -> None:
        task = self.pick(number)
        if task.status is not TaskStatus.QUEUED:
            return
        planned = replace(task, version=task.version + 1) if stale else task
        committed = self.runner.run(self.store.commit([placing(planned)]))
        assert committed.applied == [not stale]
        if not stale:
            placed, _ = committed.objects[0]
            assert isinstance(placed, Task)
            self.tasks[placed.task_id] = placed
            self.phases[f"{placed.task_id}-{placed.attempt}"] = RunPhase.ASSIGNED

    @precondition(has_tasks)
    @rule(number=PICK, status=st.sampled_from(list(TaskStatus)))
    def move(self, number: int, status: TaskStatus) -> None:
        """What the controller writes of a placed task."""
        task = self.pick(number)
        if task.status is TaskStatus.QUEUED or status not in TASK_TRANSITIONS[task.status]:
            return
        self.clock += 1000
        wished = replace(task, status=status, finished_at=self.clock if status.terminal else None)
        committed = self.runner.run(self.store.commit([[wished]]))
        assert committed.applied == [True]
        moved = committed.objects[0][0]
        assert isinstance(moved, Task)
        self.tasks[moved.task_id] = moved

    @precondition(has_tasks)
    @rule(number=PICK, phase=PHASES)
    def tell(self, number: int, phase: RunPhase) -> None:
        """A worker's report, in order or not."""
        task = self.pick(number)
        run_id = f"{task.task_id}-{task.attempt}"
        run = self.runner.run(self.store.get_runs([run_id])).get(run_id)
        assert (run is None) == (run_id not in self.phases)
        if run is None:
            return
        assert run.phase is self.phases[run_id]
        told = self.runner.run(self.store.report_run(report(run, phase)))
        assert told is not None
        if phase in RUN_TRANSITIONS[run.phase]:
            self.phases[run_id] = phase
        assert told.phase is self.phases[run_id]

    @precondition(has_tasks)
    @rule(number=PICK, back=st.integers(-2, 3), data=st.binary(min_size=1, max_size=4))
    def append(self, number: int, back: int, data: bytes) -> None:
        """A piece of a log that fits, overlaps or leaves a gap."""
        task = self.pick(number)
        run_id = f"{task.task_id}-{task.attempt}"
        if run_id not in self.phases:
            return
        log = self.logs.get(run_id, b"")
        offset = max(0, len(log) - back)
        if 0 < offset + len(data) <= len(log) or offset > len(log):
            expected = log
        else:
            # What overlaps is what was sent before: a worker never changes its mind about a byte.
            data = log[offset:] + data[len(log) - offset :]
            expected = log[:offset] + data
        end = self.runner.run(self.store.append_log(run_id, offset, data))
        assert end == len(expected)
        self.logs[run_id] = expected

    @rule(batch=st.integers(1, 2))
    def retain(self, batch: int) -> None:
        ended = sorted(
            (task for task in self.tasks.values() if task.finished_at is not None and task.finished_at < self.clock),
            key=lambda task: (task.finished_at, task.task_id),
        )
        while self.runner.run(self.store.delete_logs(self.clock, batch)):
            pass
        gone = self.runner.run(self.store.delete_finished(self.clock, batch))
        assert gone == len(ended[:batch])
        for task in ended[:batch]:
            del self.tasks[task.task_id]
            self.keys = {key: task_id for key, task_id in self.keys.items() if task_id != task.task_id}

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.close())
        self.store = self.runner.run(open_store(self.url))

    # -- what must hold

    @invariant()
    def lists_and_totals_are_those_of_the_model(self) -> None:
        newest = list(reversed(self.tasks.values()))
        totals = self.runner.run(self.store.totals())
        assert Counter({status: count for status, count in totals.items() if count}) == Counter(
            task.status for task in newest
        )
        assert self.runner.run(self.store.list_tasks(TaskQuery())).tasks == newest
        for user in USERS:
            page = self.runner.run(self.store.list_tasks(TaskQuery(user_id=user, status=TaskStatus.QUEUED)))
            mine = [task for task in newest if task.spec.user_id == user and task.status is TaskStatus.QUEUED]
            assert (page.tasks, page.total) == (mine, len(mine))

    @invariant()
    def the_log_of_changes_leads_to_the_present(self) -> None:
        snapshot = self.runner.run(self.store.snapshot())
        assert dict(snapshot.tasks) == {
            task_id: task for task_id, task in self.tasks.items() if not task.status.terminal
        }
        changes = self.runner.run(self.changes(snapshot.revision))
        assert [change.revision for change in changes] == list(range(1, snapshot.revision + 1))
        last = {change.key: change.event for change in changes}
        for run_id, phase in self.phases.items():
            assert last[run_id] == phase.value

    async def changes(self, until: int) -> list[Change]:
        found: list[Change] = []
        if until:
            async for batch in self.store.watch(0):
                found += batch
                if found[-1].revision >= until:
                    break
        return found

    @invariant()
    def logs_are_whole(self) -> None:
        for run_id, log in self.logs.items():
            task_id, _, attempt = run_id.rpartition("-")
            if task_id in self.tasks:
                assert self.runner.run(self.store.read_log(task_id, int(attempt), 0, 1000)).data == log


def test_sqlite() -> None:
    with TemporaryDirectory() as directory:

        class OnSqlite(Machine):
            urls = itertools.chain(f"sqlite:///{Path(directory)}/{number}.db" for number in itertools.count())

        check(OnSqlite, 30)


def test_postgres(postgres: Postgres) -> None:
    class OnPostgres(Machine):
        urls = itertools.chain(postgres.create(f"stateful_{number}") for number in itertools.count())

    check(OnPostgres, 5)


def check(machine: type[Machine], examples: int) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=25, suppress_health_check=slow, derandomize=True),
    )
