"""Queued tasks of one shape (the same amounts asked for), oldest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from cloudai.resources import Task

Age = tuple[int, str]


def age(task: Task) -> Age:
    """Sorts tasks oldest first; a task that waits for its next attempt keeps the age it was submitted with."""
    return (task.created_at, task.task_id)


class AgeQueue:
    """Sorted by age. New tasks come at the end and placed ones leave at the front, so both are cheap."""

    __slots__ = ("_gone", "_tasks")

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._gone = 0  # how many at the front have left; the list is cut only now and then

    @property
    def head(self) -> Task:
        """The oldest; IndexError where it is empty."""
        return self._tasks[self._gone]

    def __len__(self) -> int:
        return len(self._tasks) - self._gone

    def __iter__(self) -> Iterator[Task]:
        for place in range(self._gone, len(self._tasks)):
            yield self._tasks[place]

    def put(self, task: Task) -> None:
        """Add a task that is not in it yet."""
        if not self._tasks or age(self._tasks[-1]) < age(task):
            self._tasks.append(task)
        else:
            insort(self._tasks, task, lo=self._gone, key=age)

    def drop(self, task: Task) -> None:
        """Remove a task that is in it."""
        place = bisect_left(self._tasks, age(task), lo=self._gone, key=age)
        if place > self._gone:
            del self._tasks[place]
            return
        self._gone += 1
        if self._gone > 256 and self._gone * 2 > len(self._tasks):
            del self._tasks[: self._gone]
            self._gone = 0
