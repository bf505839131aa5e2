"""A model of everything outside the pure core: what is stored, and the only changes that anybody may make to it.

It holds the promises as assertions, so whatever drives it (random lives, scenarios) checks them at every change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cloudai.resources import (
    NOTHING,
    RUN_TRANSITIONS,
    TASK_TRANSITIONS,
    Resources,
    Run,
    RunPhase,
    Task,
    TaskSpec,
    TaskStatus,
    Worker,
    gpu_free,
)
from cloudai_controller.actions import Action, group
from cloudai_controller.plan import PLACEMENTS, plan
from cloudai_controller.state import MARGIN, Heard, Terms, View

LEASE = 300_000
TERMS = Terms(heartbeat=10_000, lease=LEASE, grace=10_000)
START = 1_000_000


def a_task(number: int, amounts: Resources, *, max_retries: int | None = None) -> Task:
    spec = TaskSpec(user_id="ann", image="busybox", command="true", resources=amounts, max_retries=max_retries)
    return Task(task_id=f"task-{number}", spec=spec, status=TaskStatus.QUEUED, created_at=number, version=1)


def a_worker(name: str, amounts: Resources) -> Worker:
    return Worker(
        worker_id=name,
        identity="identity",
        address="10.0.0.1:50052",
        capacity=amounts,
        runtime="docker",
        registered_at=START,
        last_heartbeat=START,
    )


class World:
    """`view` follows every change, as the controller's does. `sound` is False for one that begins with broken promises.

    `skew`: how far (ms) the clock that `last_heartbeat` is taken from is ahead of the controller's.
    """

    def __init__(self, *, sound: bool = True, skew: int = 0) -> None:
        self.sound = sound
        self.skew = skew
        self.now = START
        self.tasks: dict[str, Task] = {}
        self.runs: dict[str, Run] = {}
        self.workers: dict[str, Worker] = {}
        self.heard: dict[str, int] = {}  # when each worker was really heard of
        self.submitted = 0
        self.view = View(TERMS, self.now)

    # -- clients, workers

    def submit(self, amounts: Resources, max_retries: int | None = None) -> Task:
        self.submitted += 1
        task = a_task(100 + self.submitted, amounts, max_retries=max_retries)
        self._store(task)
        return task

    def cancel(self, task_id: str) -> None:
        task = self.tasks[task_id]
        if task.status is TaskStatus.QUEUED:
            self._store(replace(task, status=TaskStatus.CANCELLED, cancel_requested=True, version=task.version + 1))
        elif not task.status.terminal:
            self._store(replace(task, cancel_requested=True, version=task.version + 1))

    def join(self, worker: Worker) -> None:
        """It registers now."""
        worker = replace(worker, last_heartbeat=self.now + self.skew)
        self.workers[worker.worker_id] = worker
        self.heard[worker.worker_id] = self.now
        self.view.put_worker(worker, self.now)

    def leave(self, name: str) -> None:
        assert all(run.worker_id != name for run in self.live_runs())
        del self.workers[name]
        self.heard.pop(name, None)
        self.view.drop_worker(name)

    def beat(self, name: str, *, ready: bool = True) -> None:
        self.join(replace(self.workers[name], ready=ready))

    def look(self) -> None:
        """The controller reads all workers."""
        for worker in self.workers.values():
            self.view.put_worker(worker, self.now)
        self.view.looked_at = self.now

    def report(self, name: str, phase: RunPhase) -> None:
        run = self.runs[name]
        began = self.now if phase is RunPhase.RUNNING else run.started_at
        ended = self.now if phase.terminal else None
        code = 0 if phase is RunPhase.SUCCEEDED else None
        self._store(
            replace(run, phase=phase, started_at=began, finished_at=ended, exit_code=code, version=run.version + 1)
        )

    def silent(self, name: str) -> int:
        """For how long (ms) nothing has come from a worker."""
        return self.now - self.heard.get(name, 0)

    def live_runs(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.phase.terminal]

    # -- the controller

    def restart(self) -> None:
        """The controller forgets, and reads everything anew."""
        self.view = self.read_anew(self.now, {})

    def read_again(self) -> View:
        """What the controller would know if it read again all that is stored."""
        return self.read_anew(self.view.observing_since, self.view.heard)

    def read_anew(self, observing_since: int, heard: Mapping[str, Heard]) -> View:
        """What a controller reads that has watched since then and `heard` of workers then."""
        view = View(TERMS, observing_since)
        for worker in self.workers.values():
            view.put_worker(worker, self.now)
        view.looked_at = self.now
        view.heard.update(heard)
        for task in self.tasks.values():
            view.put_task(task)
        for run in self.runs.values():
            view.put_run(run)
        return view

    def act(self) -> list[Action]:
        """One pass: plan and apply."""
        return self.act_within(PLACEMENTS)

    def act_within(self, limit: int) -> list[Action]:
        """One pass with at most `limit` placements."""
        made = plan(self.view, self.now, limit)
        assert plan(self.view, self.now, limit) == made, "the same view and time give the same plan"
        self.view.settle(made.findings)
        self.apply(made.actions)
        return made.actions

    def rest(self) -> None:
        """Passes until nothing is left to do."""
        for _ in range(20):
            if not self.act():
                return
        raise AssertionError("planning does not come to rest")

    def apply(self, actions: Sequence[Action]) -> None:
        for action in actions:
            for item in group(action):
                self._store(replace(item, version=item.version + 1))
        if self.sound:
            self.check()

    # -- the promises

    def check(self) -> None:
        held: dict[str, list[Run]] = defaultdict(list)
        for run in self.live_runs():
            held[run.worker_id].append(run)
        for name, runs in held.items():
            worker = self.workers[name]
            assert sum((run.resources for run in runs), NOTHING).within(worker.capacity), f"{name} is over its capacity"
            shares = [share for run in runs for share in run.gpus]
            assert all(left >= 0 for left in gpu_free(worker.gpu_devices, shares)), f"a device of {name} is over"
        self._check_runs()

    def _check_runs(self) -> None:
        live = [run.task_id for run in self.live_runs()]
        assert len(live) == len(set(live)), "two live runs of one task"
        for run in self.live_runs():
            task = self.tasks[run.task_id]
            assert not task.status.terminal, "a live run of a finished task"
            assert sum(share.milli for share in run.gpus) == run.resources.gpu

    def _store(self, item: Task | Run) -> None:
        if isinstance(item, Task):
            known = self.tasks.get(item.task_id)
            if known:
                assert item.version == known.version + 1, "planned on an old version"
                _allowed(known.status, item.status, TASK_TRANSITIONS[known.status])
            self.tasks[item.task_id] = item
            self.view.put_task(item)
        else:
            self._store_run(item)

    def _store_run(self, run: Run) -> None:
        known = self.runs.get(run.run_id)
        if known:
            assert run.version == known.version + 1, "planned on an old version"
            _allowed(known.phase, run.phase, RUN_TRANSITIONS[known.phase])
            if run.phase is RunPhase.LOST:
                assert self.silent(run.worker_id) > LEASE + TERMS.grace + MARGIN, (
                    "lost although its worker may still run it"
                )
        else:
            assert not self.tasks[run.task_id].cancel_requested, "started although it was cancelled"
            assert self.workers[run.worker_id].ready
            # Where clocks differ, a controller that has just begun may think a silent worker active for a moment.
            observed = self.now - self.view.observing_since > 3 * TERMS.heartbeat
            if not self.skew or observed:
                assert self.silent(run.worker_id) <= 3 * TERMS.heartbeat, "placed on an inactive worker"
        self.runs[run.run_id] = run
        self.view.put_run(run)


def _allowed(before: str, after: str, following: frozenset[TaskStatus] | frozenset[RunPhase]) -> None:
    assert before == after or after in following, f"{before} may not become {after}"
