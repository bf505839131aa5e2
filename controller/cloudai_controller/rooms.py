"""What is free on each worker, kept in best-fit order so that finding a place looks at few workers.

The view holds one `Rooms` of all workers; a scheduling pass holds a second, small one for the workers it has already
placed something on, and so never changes the first.

Best fit: the least free GPU first (so that work without a need for GPUs goes to machines that have none), then the least
free cpu, memory, storage, then the name.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from cloudai.resources import GpuShare, Resources, Worker, gpu_shares


@dataclass(frozen=True, slots=True)
class Room:
    """What is free on one worker: in all, and per GPU device in milli-GPUs."""

    worker_id: str
    free: Resources
    gpus: tuple[int, ...]

    @classmethod
    def of(cls, worker: Worker) -> Room:
        """A worker with nothing on it."""
        return cls(worker.worker_id, worker.capacity, (1000,) * worker.gpu_devices)

    @property
    def rank(self) -> tuple[int, int, int, int, str]:
        """Lower is the better fit among those that fit."""
        free = self.free
        return (free.gpu, free.cpu, free.memory, free.storage, self.worker_id)

    def shares(self, amount: Resources) -> tuple[GpuShare, ...] | None:
        """The GPU devices `amount` would get here; None where it does not fit."""
        if not amount.within(self.free):
            return None
        return gpu_shares(amount.gpu, list(self.gpus)) if amount.gpu else ()

    def less(self, amount: Resources, shares: tuple[GpuShare, ...]) -> Room:
        """This room once `amount` is handed out."""
        return Room(self.worker_id, self.free - amount, self._devices(shares, -1) if shares else self.gpus)

    def more(self, amount: Resources, shares: tuple[GpuShare, ...]) -> Room:
        """This room once `amount` is given back."""
        return Room(self.worker_id, self.free + amount, self._devices(shares, 1) if shares else self.gpus)

    def _devices(self, shares: tuple[GpuShare, ...], sign: int) -> tuple[int, ...]:
        free = list(self.gpus)
        for share in shares:
            # A worker may come back with fewer devices than a run of its was given.
            if share.device < len(free):
                free[share.device] += sign * share.milli
        return tuple(free)

    def shortfall(self, amount: Resources) -> int:
        """How far from fitting, in millionths of the request summed over the resources; 0 where it fits."""
        free = self.free
        short = _part(amount.cpu, free.cpu) + _part(amount.memory, free.memory) + _part(amount.storage, free.storage)
        if amount.gpu:
            short += self._gpu_missing(amount.gpu) * 1_000_000 // amount.gpu
        return short

    def _gpu_missing(self, milli: int) -> int:
        """The milli-GPUs that must become free, on the devices nearest to it, before `milli` can be packed."""
        whole, fraction = divmod(milli, 1000)
        emptiest = sorted(self.gpus, reverse=True)
        missing = sum(1000 - left for left in emptiest[:whole])
        if fraction:
            rest = emptiest[whole] if whole < len(emptiest) else 0
            missing += max(0, fraction - rest)
        return missing


def _part(wanted: int, free: int) -> int:
    return -((free - wanted) * 1_000_000 // wanted) if wanted > free else 0


class Rooms:
    """Rooms by worker, and in best-fit order."""

    def __init__(self) -> None:
        self._rooms: dict[str, Room] = {}
        # Free GPU → (cpu, memory, storage, worker) sorted.
        self._lines: dict[int, list[tuple[int, int, int, str]]] = {}

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._rooms

    def __iter__(self) -> Iterator[Room]:
        return iter(self._rooms.values())

    def get(self, worker_id: str) -> Room | None:
        return self._rooms.get(worker_id)

    def put(self, room: Room) -> None:
        self.drop(room.worker_id)
        self._rooms[room.worker_id] = room
        insort(self._lines.setdefault(room.free.gpu, []), room.rank[1:])

    def drop(self, worker_id: str) -> None:
        room = self._rooms.pop(worker_id, None)
        if room is None:
            return
        line = self._lines[room.free.gpu]
        del line[bisect_left(line, room.rank[1:])]
        if not line:
            del self._lines[room.free.gpu]

    def fitting(self, amount: Resources) -> Iterator[Room]:
        """Rooms with enough of each total, best fit first; whether GPU devices can be packed is for the caller to try."""
        for gpu in sorted(gpu for gpu in self._lines if gpu >= amount.gpu):
            line = self._lines[gpu]
            for place in range(bisect_left(line, (amount.cpu,)), len(line)):
                _, memory, storage, worker_id = line[place]
                if memory >= amount.memory and storage >= amount.storage:
                    yield self._rooms[worker_id]
