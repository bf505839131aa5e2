"""Which queued task goes where. Pure: it reads the view and the time, and changes neither.

Oldest first over all shapes, each to the worker where it fits best. The oldest task that fits nowhere now, but would fit
some worker's whole, holds back the worker that is nearest to having room: nothing younger goes there, so small tasks
cannot starve a large one. A task larger than every worker waits without standing in anybody's way.

Cost: a shape that is known to fit nowhere is tried only on workers that have gained room since, and of a shape only the
oldest task is tried in vain.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cloudai.resources import GpuShare, Resources, Task, TaskStatus, gpu_shares
from cloudai_controller.queues import Age, age
from cloudai_controller.rooms import Room, Rooms
from cloudai_controller.state import Hold, View


@dataclass(frozen=True, slots=True)
class Placement:
    task: Task
    worker_id: str
    gpus: tuple[GpuShare, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """`unfit`: shapes whose oldest waiting task fits nowhere. `complete`: False where the limit ended the pass."""

    placements: list[Placement]
    unfit: frozenset[Resources]
    hold: Hold | None
    complete: bool


def schedule(view: View, now: int, limit: int) -> Schedule:
    """Up to `limit` placements."""
    hold = view.hold if view.hold and _waits(view, view.hold.task_id) else None
    gained = set(view.gained)
    if view.hold and not hold:
        gained.add(view.hold.worker_id)
    if not gained:
        if not view.fresh:
            return Schedule([], frozenset(), hold, True)
        made = _Pass(view, now, limit, frozenset(), hold).run()
        if hold is None or (made.hold and made.hold.worker_id == hold.worker_id):
            return made
        # Another task holds another worker back now, so the first one is open to every shape.
    if hold:
        gained.add(hold.worker_id)
    return _Pass(view, now, limit, frozenset(gained), hold).run()


def _waits(view: View, task_id: str) -> bool:
    task = view.tasks.get(task_id)
    return task is not None and task.status is TaskStatus.QUEUED


class _Pass:
    """One pass. `touched` has what is left on the workers it has placed something on, in front of the view's rooms.

    `gained`: where shapes that are known to fit nowhere are tried again; empty when only fresh shapes can find a place.
    """

    def __init__(self, view: View, now: int, limit: int, gained: frozenset[str], before: Hold | None) -> None:
        self._view, self._now, self._limit, self._gained, self._before = view, now, limit, gained, before
        self._hold: Hold | None = None
        self._touched = Rooms()
        self._placements: list[Placement] = []
        self._unfit: set[Resources] = set()
        self._search: dict[Resources, tuple[Room | None, Iterator[Room]]] = {}

    def run(self) -> Schedule:
        heads = self._heads()
        while heads and len(self._placements) < self._limit:
            _, task, line = heads[0]
            following = next(line, None) if self._place(task) else None
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (age(following), following, line))
        if heads and self._hold is None:
            self._hold = self._still_before()
        return Schedule(self._placements, frozenset(self._unfit), self._hold, complete=not heads)

    def _heads(self) -> list[tuple[Age, Task, Iterator[Task]]]:
        """A heap of the oldest task of each shape to try, with those behind it."""
        heads: list[tuple[Age, Task, Iterator[Task]]] = []
        for shape in self._shapes():
            line = (task for task in self._view.queues[shape] if _placeable(self._view, task))
            first = next(line, None)
            if first is not None:
                heads.append((age(first), first, line))
        heapq.heapify(heads)
        return heads

    def _shapes(self) -> Iterable[Resources]:
        if self._gained:
            return self._view.queues
        if self._before is None:
            return self._view.fresh
        return self._view.fresh | {self._view.tasks[self._before.task_id].spec.resources}

    def _still_before(self) -> Hold | None:
        """The hold so far, where this pass ended before it came to the task."""
        if self._before and all(made.task.task_id != self._before.task_id for made in self._placements):
            return self._before
        return None

    def _place(self, task: Task) -> bool:
        amount = task.spec.resources
        chosen = self._choose(amount)
        if chosen is None:
            self._unfit.add(amount)
            self._hold = self._hold or self._held_for(task)
            return False
        room, shares = chosen
        self._touched.put(room.less(amount, shares))
        self._placements.append(Placement(task, room.worker_id, shares))
        return True

    def _choose(self, amount: Resources) -> tuple[Room, tuple[GpuShare, ...]] | None:
        best = self._untouched(amount)
        for room in self._touched.fitting(amount):
            if best and best[0].rank < room.rank:
                break
            shares = room.shares(amount) if self._open(room.worker_id) else None
            if shares is not None:
                return room, shares
        return best

    def _untouched(self, amount: Resources) -> tuple[Room, tuple[GpuShare, ...]] | None:
        """The best of the workers without a new placement. What was passed over stays so: rooms only shrink in a pass."""
        room, rest = self._search.get(amount) or self._start(amount)
        while room is not None:
            if room.worker_id not in self._touched and self._open(room.worker_id):
                shares = room.shares(amount)
                if shares is not None:
                    self._search[amount] = (room, rest)
                    return room, shares
            room = next(rest, None)
        self._search[amount] = (None, rest)
        return None

    def _start(self, amount: Resources) -> tuple[Room | None, Iterator[Room]]:
        if amount in self._view.fresh:
            rest = self._view.rooms.fitting(amount)
        else:
            found = (self._view.rooms.get(worker_id) for worker_id in self._gained)
            rest = iter(
                sorted((room for room in found if room and amount.within(room.free)), key=lambda room: room.rank)
            )
        return next(rest, None), rest

    def _open(self, worker_id: str) -> bool:
        held = self._hold is not None and self._hold.worker_id == worker_id
        return not held and self._view.active(worker_id, self._now)

    def _held_for(self, task: Task) -> Hold | None:
        amount = task.spec.resources
        nearest = min(
            (
                (room.shortfall(amount), room.worker_id)
                for room in self._drainable(task)
                if self._view.active(room.worker_id, self._now) and self._could_hold(room.worker_id, amount)
            ),
            default=None,
        )
        return nearest and Hold(task.task_id, nearest[1])

    def _drainable(self, task: Task) -> Iterator[Room]:
        """All rooms; only those that may have come nearer than the worker held so far, where that is still as it was."""
        view, before = self._view, self._before
        if before and before.task_id == task.task_id and self._unchanged(before.worker_id):
            names: Iterable[str] = {before.worker_id} | view.gained
        else:
            names = view.workers
        for name in names:
            room = self._touched.get(name) or view.rooms.get(name)
            if room is not None:
                yield room

    def _unchanged(self, worker_id: str) -> bool:
        changed = worker_id in self._view.gained or worker_id in self._touched
        return not changed and self._view.active(worker_id, self._now)

    def _could_hold(self, worker_id: str, amount: Resources) -> bool:
        worker = self._view.workers[worker_id]
        whole = [1000] * worker.gpu_devices
        return amount.within(worker.capacity) and (not amount.gpu or gpu_shares(amount.gpu, whole) is not None)


def _placeable(view: View, task: Task) -> bool:
    return not task.cancel_requested and not view.runs_of(task.task_id)
