"""Keys that need a look: each is worked on by one worker at a time, at once or later, and again after a fault.

As in Kubernetes' own controllers: a key that is added while it is being worked on is worked on once more afterwards.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable

from cloudai.errors import CloudAIError
from cloudai.store.kube.api import ApiError
from cloudai_controller import metrics
from cloudai_controller.kube.lease import NotLeading

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds before a key that failed is tried again

LASTING = 5  # failures after which what may pass counts as lasting

LEFT_OVER = 1000  # times of keys that were forgotten, until they are cleared away

log = logging.getLogger("cloudai.operator")


class WorkQueue:
    """`work(key)` returns the seconds after which to look again, or None; an exception is a fault that may pass."""

    def __init__(self, work: Callable[[str], Awaitable[float | None]]) -> None:
        self._work = work
        self._ready: deque[str] = deque()
        self._queued: set[str] = set()
        self._busy: set[str] = set()
        self._again: set[str] = set()
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._failures: dict[str, int] = {}
        self._more = asyncio.Event()
        self._earlier = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._busy)

    def add(self, key: str) -> None:
        """Work on the key soon; once, however often it is added until then."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.append(key)
            self._more.set()

    def add_after(self, key: str, seconds: float) -> None:
        """Keeps the earlier time where one is set already."""
        due = asyncio.get_running_loop().time() + seconds
        if self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        if self._heap[0] == (due, key):
            self._earlier.set()

    def forget(self, key: str) -> None:
        """Nothing is to be done about the key later."""
        self._due.pop(key, None)
        if len(self._heap) > 2 * len(self._due) + LEFT_OVER:
            self._heap = [(due, one) for one, due in self._due.items()]
            heapq.heapify(self._heap)

    async def run(self, workers: int) -> None:
        """Work with so many at once until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick())
            for _ in range(workers):
                group.create_task(self._serve())

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._heap and self._heap[0][0] <= loop.time():
                due, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.add(key)
            wait = self._heap[0][0] - loop.time() if self._heap else None
            self._earlier.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._earlier.wait()
            except TimeoutError:
                continue

    async def _serve(self) -> None:
        while True:
            while not self._ready:
                self._more.clear()
                await self._more.wait()
            key = self._ready.popleft()
            self._queued.discard(key)
            self._busy.add(key)
            try:
                again = await self._work(key)
                self._failures.pop(key, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, the key is looked at again
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                _tell(key, error, failures)
                again = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)
            finally:
                self._busy.discard(key)
            await asyncio.sleep(
                0
            )  # work that waits for nothing keeps nobody else, such as who renews the lease, waiting
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            if again is not None:
                self.add_after(key, again)


def _tell(key: str, error: Exception, failures: int) -> None:
    """Tell of a fault: a conflict or an absent object is a look at old facts, a server that cannot be had may be back soon."""
    refused = isinstance(error, ApiError) and error.status in (404, 409)
    (metrics.REFUSED if refused else metrics.ERRORS).inc()
    passing = refused or isinstance(error, NotLeading | CloudAIError)
    if failures == LASTING or (failures == 1 and not passing):
        log.warning(
            "%s failed and is tried again: %s", key, error, exc_info=not (passing or isinstance(error, ApiError))
        )
    else:
        log.debug("%s: %s", key, error)
