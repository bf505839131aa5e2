"""The queue of keys: each worked on by one worker at a time, and never forgotten but on request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from cloudai_controller.kube import workqueue
from cloudai_controller.kube.workqueue import WorkQueue


@contextmanager
def working(queue: WorkQueue, workers: int = 4) -> Iterator[None]:
    running = asyncio.ensure_future(queue.run(workers))
    try:
        yield
    finally:
        running.cancel()


class Work:
    """Does what it is told of each key, and notes what was asked for."""

    def __init__(self, act: Callable[[str], Awaitable[float | None]] | None = None) -> None:
        self.done: list[str] = []
        self.more = asyncio.Event()
        self._act = act

    async def __call__(self, key: str) -> float | None:
        self.done.append(key)
        self.more.set()
        return None if self._act is None else await self._act(key)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.done) < count:
                self.more.clear()
                await self.more.wait()


async def test_a_key_that_is_added_often_is_worked_on_once() -> None:
    work = Work()
    queue = WorkQueue(work)
    for key in "aabab":
        queue.add(key)
    assert len(queue) == 2
    with working(queue):
        await work.until(2)
    assert work.done == ["a", "b"]


async def test_a_key_that_is_added_while_it_is_worked_on_is_worked_on_afterwards() -> None:
    go_on = asyncio.Event()

    async def wait(_: str) -> None:
        await go_on.wait()

    work = Work(wait)
    queue = WorkQueue(work)
    with working(queue):
        queue.add("a")
        await work.until(1)
        queue.add("a")
        queue.add("b")
        await work.until(2)
        assert work.done == ["a", "b"]  # the second look at "a" waits, though workers are free
        go_on.set()
        await work.until(3)
    assert work.done == ["a", "b", "a"]


async def test_what_failed_is_tried_again() -> None:
    async def fail_once(key: str) -> None:
        if work.done.count(key) == 1:
            raise ValueError(key)

    work = Work(fail_once)
    queue = WorkQueue(work)
    with working(queue):
        queue.add("a")
        await work.until(2)
    assert work.done == ["a", "a"]


async def test_the_earliest_of_several_times_counts() -> None:
    work = Work()
    queue = WorkQueue(work)
    queue.add_after("a", 1000)
    queue.add_after("a", 0.01)
    queue.add_after("a", 2000)
    with working(queue):
        await work.until(1)


async def test_a_time_that_comes_before_all_others_is_not_slept_over() -> None:
    work = Work()
    queue = WorkQueue(work)
    with working(queue):
        queue.add_after("late", 1000)
        queue.add("now")
        await work.until(1)  # by then the queue waits for the late one
        queue.add_after("soon", 0.01)
        await work.until(2)
    assert work.done == ["now", "soon"]


async def test_a_forgotten_key_has_no_time_and_leaves_nothing() -> None:
    work = Work()
    queue = WorkQueue(work)
    for number in range(10 * workqueue.LEFT_OVER):
        queue.add_after(f"gone-{number}", 0.0)
        queue.forget(f"gone-{number}")
    assert len(queue._heap) <= workqueue.LEFT_OVER + 1
    queue.add_after("a", 0.01)
    with working(queue):
        await work.until(1)
    assert work.done == ["a"]
