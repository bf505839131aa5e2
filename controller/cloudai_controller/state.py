"""The controller's view: everything that is active, in memory, with the indices that make a pass cost what has changed.

The loop feeds it values read from the store (`put_…`, `drop_…`); `plan` only reads it. After a pass, `settle` takes down
what the pass has proven, so that the next one does not prove it again:

* `dirty`: tasks to look at again,
* `fresh`: shapes with a task that no pass has tried yet; every other queued shape is known to fit nowhere,
* `gained`: workers that may have more room than at the last pass, so that known shapes are tried there again,
* `hold`: which worker drains for which large task.

Finished tasks and ended runs leave it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cloudai.resources import PLACED_STATUSES, Resources, Run, Task, TaskSpec, TaskStatus, Worker, run_id
from cloudai_controller.queues import AgeQueue
from cloudai_controller.rooms import Room, Rooms

MARGIN = 10_000  # ms on top of lease and grace, for an agent to see its lease run out and kill what does not stop
_SHARED = 10_000  # how many different values are kept for sharing
_NO_RUNS: Mapping[str, Run] = {}


@dataclass(frozen=True, slots=True)
class Terms:
    """The rules of time, in ms. `lease` None: a silent worker is never given up."""

    heartbeat: int
    lease: int | None
    grace: int  # that a container gets to stop


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing younger than the task goes to the worker: it drains for the task."""

    task_id: str
    worker_id: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What a pass has proven: shapes that found a place to the last, and shapes that did not.

    `complete` is False where it ended at its limit before every shape was tried.
    """

    at: int
    fit: frozenset[Resources]
    unfit: frozenset[Resources]
    hold: Hold | None
    complete: bool
    expiry: int | None  # the earliest time a silent worker can count as lost


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker's last sign of life, in ms by this controller's clock, which alone says how long ago it was.

    `read`: when it was read, so no earlier than it was sent; leases count from here. `sent`: when it was sent, as far as the
    clock of the API server that took it is right; otherwise wrong by no more than a heartbeat and the time between two looks
    at the workers.
    """

    read: int
    sent: int


class View:
    """See the module. `observing_since` is when this controller began to watch without a gap, in ms."""

    def __init__(self, terms: Terms, observing_since: int) -> None:
        self.terms = terms
        self.observing_since = observing_since
        self.looked_at = 0  # when all workers were last read, in ms
        self.heard: dict[str, Heard] = {}
        self.tasks: dict[str, Task] = {}
        self.workers: dict[str, Worker] = {}
        self.rooms = Rooms()
        self.queues: dict[Resources, AgeQueue] = {}
        self.queued = 0
        self.dirty: set[str] = set()
        self.fresh: set[Resources] = set()
        self.gained: set[str] = set()
        self.hold: Hold | None = None
        self.expiry: int | None = 0
        self._runs: dict[str, dict[str, Run]] = {}  # of a task: live ones, and the current one even when it has ended
        self._held: dict[str, dict[str, Run]] = {}  # live ones of a worker
        self._specs: dict[TaskSpec, TaskSpec] = {}
        self._shapes: dict[Resources, Resources] = {}
        self._settled_at = observing_since

    # -- reading

    def runs_of(self, task_id: str) -> Mapping[str, Run]:
        """The task's live runs, and its current one even when it has ended, by run id."""
        return self._runs.get(task_id, _NO_RUNS)

    def runs_on(self, worker_id: str) -> Mapping[str, Run]:
        """The live runs of a worker, by run id."""
        return self._held.get(worker_id, _NO_RUNS)

    def busy_workers(self) -> Iterable[str]:
        """Workers with live runs, whether or not they are known."""
        return self._held.keys()

    def active(self, worker_id: str, now: int) -> bool:
        """Able to start containers and heard of within three heartbeats."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.ready and now - self.heard[worker_id].sent <= 3 * self.terms.heartbeat

    def expires(self, worker_id: str) -> int | None:
        """From when on the worker counts as lost, if it stays silent; None for never. Its agent goes by the lease and grace
        that it was told when it joined, which may be others than are set now.
        """
        if self.terms.lease is None:
            return None
        known, heard = self.workers.get(worker_id), self.heard.get(worker_id)
        promised = known.lease if known is not None else 0
        silent_since = max(heard.read if heard else 0, self.observing_since)
        return silent_since + max(self.terms.lease + self.terms.grace, promised) + MARGIN + 1

    @property
    def settled(self) -> bool:
        """True when nothing has changed that a pass has not seen."""
        return not (self.dirty or self.fresh or self.gained)

    # -- feeding

    def put_task(self, task: Task) -> None:
        """Take a task as stored; an older version than the known one changes nothing."""
        known = self.tasks.get(task.task_id)
        if known is not None and known.version > task.version:
            return
        if task.status.terminal:
            self.drop_task(task.task_id)
            return
        if known is not None:
            self._dequeue(known)
        task = self._shared(task)
        self.tasks[task.task_id] = task
        if task.status is TaskStatus.QUEUED:
            self._enqueue(task)
        if task.status is not TaskStatus.QUEUED or task.cancel_requested or task.task_id in self._runs:
            self._forget_old_runs(task)
            self.dirty.add(task.task_id)

    def drop_task(self, task_id: str) -> None:
        """The task is finished or gone."""
        known = self.tasks.pop(task_id, None)
        if known is not None:
            self._dequeue(known)
        self.dirty.discard(task_id)
        runs = self._runs.get(task_id)
        if runs is None:
            return
        for key in [key for key, run in runs.items() if run.phase.terminal]:
            del runs[key]
        if runs:
            self.dirty.add(task_id)
        else:
            del self._runs[task_id]

    def put_run(self, run: Run) -> None:
        """Take a run as stored; an older version than the known one changes nothing."""
        key = run.run_id
        known = self.runs_of(run.task_id).get(key)
        if known is not None:
            if known.version > run.version:
                return
            self._give_back(known)
        task = self.tasks.get(run.task_id)
        if not run.phase.terminal:
            self._take(run)
        if not run.phase.terminal or (task is not None and task.attempt == run.attempt and _placed(task)):
            self._runs.setdefault(run.task_id, {})[key] = run
        elif known is not None:
            self._remove_run(known)
        self.dirty.add(run.task_id)

    def drop_run(self, task_id: str, key: str) -> None:
        """The run is not stored any more."""
        known = self.runs_of(task_id).get(key)
        if known is not None:
            self._give_back(known)
            self._remove_run(known)
            self.dirty.add(task_id)

    def put_worker(self, worker: Worker, read_at: int) -> None:
        """Take a worker as stored. `read_at`: the time after it was read.

        Its `last_heartbeat` is another machine's time: that it is not the same as before is the sign of life.
        """
        name = worker.worker_id
        known = self.workers.get(name)
        was_active = self.active(name, self._settled_at)
        alive = known is None or known.last_heartbeat != worker.last_heartbeat
        if alive:
            # It was not there at the look before; it may have come by then, and be stored up to a heartbeat later.
            earliest = self.looked_at - self.terms.heartbeat
            self.heard[name] = Heard(read_at, min(max(worker.last_heartbeat, earliest), read_at))
        self.workers[name] = worker
        if known is None or known.capacity != worker.capacity:
            room = Room.of(worker)
            for run in self.runs_on(name).values():
                room = room.less(run.resources, run.gpus)
            self.rooms.put(room)
            self.gained.add(name)
        elif worker.ready and not was_active and (alive or not known.ready):
            self.gained.add(name)
        if name in self._held and known is not None and known.lease != worker.lease:
            self._expect(name)

    def drop_worker(self, worker_id: str) -> None:
        """The worker is not stored any more."""
        self.workers.pop(worker_id, None)
        self.heard.pop(worker_id, None)
        self.rooms.drop(worker_id)
        self.gained.discard(worker_id)

    def observe_from(self, now: int) -> None:
        """After a gap nobody is lost before a whole lease has passed from `now`."""
        self.observing_since = now
        # What was read later than now was read before the clock was set back.
        self.looked_at = min(self.looked_at, now)
        self.heard = {name: Heard(min(it.read, now), min(it.sent, now)) for name, it in self.heard.items()}

    def reconsider(self, worker_id: str) -> None:
        """A placement there was refused: its room is free after all."""
        self.gained.add(worker_id)

    def settle(self, found: Findings) -> None:
        """Take down what a pass has proven; call before feeding what its actions changed."""
        self._settled_at = found.at
        self.dirty.clear()
        self.fresh |= found.fit
        self.fresh -= found.unfit
        self.expiry = found.expiry
        before, self.hold = self.hold, found.hold
        if found.complete:
            self.gained.clear()
        elif before and (found.hold is None or found.hold.worker_id != before.worker_id):
            self.gained.add(before.worker_id)

    # -- inside

    def _enqueue(self, task: Task) -> None:
        shape = task.spec.resources
        queue = self.queues.get(shape)
        if queue is None:
            queue = self.queues[shape] = AgeQueue()
        queue.put(task)
        # What is true of the oldest of a shape is true of those behind it.
        if queue.head is task:
            self.fresh.add(shape)
        self.queued += 1

    def _dequeue(self, task: Task) -> None:
        if task.status is not TaskStatus.QUEUED:
            return
        queue = self.queues[task.spec.resources]
        queue.drop(task)
        self.queued -= 1
        if not queue:
            del self.queues[task.spec.resources]
            self.fresh.discard(task.spec.resources)

    def _take(self, run: Run) -> None:
        held = self._held.setdefault(run.worker_id, {})
        held[run.run_id] = run
        room = self.rooms.get(run.worker_id)
        if room is not None:
            self.rooms.put(room.less(run.resources, run.gpus))
        self._expect(run.worker_id)

    def _expect(self, worker_id: str) -> None:
        """See that a pass looks at the worker when it would count as lost."""
        expiry = self.expires(worker_id)
        if expiry is not None and (self.expiry is None or expiry < self.expiry):
            self.expiry = expiry

    def _give_back(self, run: Run) -> None:
        if run.phase.terminal:
            return
        held = self._held[run.worker_id]
        del held[run.run_id]
        if not held:
            del self._held[run.worker_id]
        room = self.rooms.get(run.worker_id)
        if room is not None:
            self.rooms.put(room.more(run.resources, run.gpus))
            self.gained.add(run.worker_id)

    def _remove_run(self, run: Run) -> None:
        runs = self._runs[run.task_id]
        del runs[run.run_id]
        if not runs:
            del self._runs[run.task_id]

    def _forget_old_runs(self, task: Task) -> None:
        current = run_id(task.task_id, task.attempt) if _placed(task) else None
        for key, run in list(self.runs_of(task.task_id).items()):
            if run.phase.terminal and key != current:
                self._remove_run(run)

    def _shared(self, task: Task) -> Task:
        """The same task with what many tasks have in common held once."""
        spec = self._specs.get(task.spec)
        if spec is None:
            if len(self._specs) >= _SHARED:
                self._specs.clear()
            if len(self._shapes) >= _SHARED:
                self._shapes.clear()
            amounts = self._shapes.setdefault(task.spec.resources, task.spec.resources)
            user_id, image = sys.intern(task.spec.user_id), sys.intern(task.spec.image)
            spec = replace(task.spec, user_id=user_id, image=image, resources=amounts)
            self._specs[spec] = spec
        return task if spec is task.spec else replace(task, spec=spec)


def _placed(task: Task) -> bool:
    return task.status in PLACED_STATUSES
