"""The operators' Lease, to the second: several of them in a loop whose time jumps, over a Lease in memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloudai.errors import unavailable
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.task_resource import Json
from cloudai_controller.kube.lease import DURATION, LAST_WRITE, LOOK, MARGIN, ONE_TRY, Leader, NotLeading
from tests.kube.jumping import JumpingClock, run

Trip = tuple[float, float]  # seconds of a request to the server, and of its answer back; inf is lost
AT_ONCE: Trip = (0.0, 0.0)
LOST: tuple[Trip, Trip] = ((inf, 0.0), (0.0, inf))


class Server:
    """Has the one Lease."""

    lease: Json | None = None

    def __init__(self) -> None:
        self._versions = itertools.count(1)

    def put(self, before: Json, spec: Json, fits: bool) -> Json | ApiError:
        if not fits:
            return ApiError(409, {"reason": "Conflict"})
        self.lease = {"metadata": {"resourceVersion": str(next(self._versions))}, "spec": before | spec}
        return self.lease


class Line(Api):
    """What an Api does for a Leader; each request takes the next of `trips`, and goes on when its sender is gone."""

    def __init__(self, server: Server, trips: Iterable[Trip] = itertools.repeat(AT_ONCE)) -> None:
        self._server = server
        self._trips = iter(trips)

    def bound(self, **limits: Any) -> Api:
        return self

    async def get(self, path: str, **query: str | int) -> Json:
        return await self._sent(lambda: self._server.lease or ApiError(404, {}))

    async def create(self, path: str, body: Json) -> Json:
        return await self._sent(lambda: self._server.put({}, body["spec"], self._server.lease is None))

    async def patch(self, path: str, body: Json) -> Json:
        def patched() -> Json | ApiError:
            lease = self._server.lease
            assert lease is not None
            same = body["metadata"]["resourceVersion"] == lease["metadata"]["resourceVersion"]
            return self._server.put(lease["spec"], body["spec"], same)

        return await self._sent(patched)

    async def _sent(self, act: Callable[[], Json | ApiError]) -> Json:
        there, back = next(self._trips)

        async def travel() -> Json | ApiError:
            await asyncio.sleep(there)
            outcome = act()
            await asyncio.sleep(back)
            return outcome

        try:
            async with asyncio.timeout(ONE_TRY):
                outcome = await asyncio.shield(asyncio.ensure_future(travel()))
        except TimeoutError:
            raise unavailable("no answer") from None
        if isinstance(outcome, ApiError):
            raise outcome
        return outcome


def leader(line: Line, name: str) -> Leader:
    return Leader(line, "namespace", name, JumpingClock())


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Fate:
    """When an operator starts, how long its requests take, and when they are lost, and how: from, for so long."""

    start: float
    trip: Trip
    outages: list[tuple[float, float, Trip]]

    def trips(self) -> Iterator[Trip]:
        while True:
            yield next((lost for begun, lasts, lost in self.outages if begun <= now() < begun + lasts), self.trip)


def seconds(least: float, most: float) -> st.SearchStrategy[float]:
    """In milliseconds: floats would mostly be whole seconds, by which everything falls in step."""
    return st.integers(round(least * 1000), round(most * 1000)).map(lambda ms: ms / 1000)


OUTAGES = st.tuples(seconds(0, 80), seconds(5, 40), st.sampled_from(LOST))
FATES = st.builds(Fate, seconds(0, 20), st.tuples(seconds(0, 2), seconds(0, 2)), st.lists(OUTAGES, max_size=3))
CUT_OFF = [(2.5, 90.0, LOST[0])]
KEEN: Trip = (5e-6, 0)  # looks at the lease when it has only just run out


class Writing:
    """An operator that writes all the time and, when its lease is lost, is started anew."""

    def __init__(self, server: Server, name: str, fate: Fate) -> None:
        self._line = Line(server, fate.trips())
        self._start = fate.start
        self._name = name
        # When each write began, when it has ended at the latest, whose it is.
        self.written: list[tuple[float, float, str]] = []

    async def run(self) -> None:
        await asyncio.sleep(self._start)
        for number in itertools.count():
            leading = leader(self._line, f"{self._name}-{number}")
            await leading.acquire()
            async with asyncio.TaskGroup() as group:
                group.create_task(leading.keep())
                group.create_task(self._write(leading))

    async def _write(self, leading: Leader) -> None:
        while leading.leads():
            self.written.append((now(), now() + leading.check(), self._name))
            await asyncio.sleep(0.5)


@given(st.lists(FATES, min_size=2, max_size=3))
@example([Fate(0, AT_ONCE, CUT_OFF), Fate(0.001, KEEN, [])])  # the closest that they come
@example([Fate(0, (0, 2), CUT_OFF), Fate(2.001, KEEN, [])])
def test_whatever_befalls_requests_a_write_has_ended_before_another_operator_begins_one(fates: list[Fate]) -> None:
    async def several() -> list[tuple[float, float, str]]:
        server = Server()
        operators = [Writing(server, str(number), fate) for number, fate in enumerate(fates)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(100), asyncio.TaskGroup() as group:
                for operator in operators:
                    group.create_task(operator.run())
        return sorted(write for operator in operators for write in operator.written)

    for (_, ended, one), (begun, _, another) in itertools.pairwise(run(several())):
        assert one == another or ended <= begun


@given(seconds(0, 0.5), seconds(0, 60), seconds(0, 60))
@example(trip=0, crash=3.01, start=0.99)  # after a renewal that the other one has only just not seen
def test_after_a_crash_another_operator_leads_within_the_lease_and_what_requests_take(
    trip: float, crash: float, start: float
) -> None:
    async def takeover() -> float:
        server, trips = Server(), itertools.repeat((trip, trip))
        first, second = leader(Line(server, trips), "first"), leader(Line(server, trips), "second")
        await first.acquire()
        both = now() + max(crash, start)  # one is gone, the other there
        keeping = asyncio.ensure_future(first.keep())
        waiting = asyncio.ensure_future(_later(start, second.acquire()))
        await asyncio.sleep(crash)
        assert not waiting.done()
        keeping.cancel()
        await waiting
        assert second.leads()
        return now() - both

    assert run(takeover()) <= DURATION - 1 + 8 * trip + 1e-6  # of sums


async def _later(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    await asyncio.sleep(seconds)
    await work


def test_a_leader_that_reaches_no_server_begins_nothing_any_more_and_ends() -> None:
    async def cut_off() -> None:
        first = leader(Line(Server(), [AT_ONCE, AT_ONCE, *[LOST[0]] * 20]), "first")
        await first.acquire()
        keeping = asyncio.ensure_future(first.keep())
        await asyncio.sleep(DURATION - MARGIN - 1)
        assert first.check() == MARGIN + 1 - LAST_WRITE
        await asyncio.sleep(1)
        with pytest.raises(NotLeading):
            first.check()
        await keeping

    run(cut_off())


@pytest.mark.parametrize("fault", LOST)
def test_a_leader_goes_on_leading_after_a_renewal_without_an_answer(fault: Trip) -> None:
    async def renewals() -> bool:
        first = leader(Line(Server(), [AT_ONCE, AT_ONCE, fault, *[AT_ONCE] * 20]), "first")
        await first.acquire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * DURATION):
                await first.keep()
        return first.leads()

    assert run(renewals())


def test_a_leader_that_ends_lets_another_one_lead_at_its_next_look() -> None:
    async def takeover() -> float:
        server = Server()
        first, second = leader(Line(server), "first"), leader(Line(server), "second")
        await first.acquire()
        waiting = asyncio.ensure_future(second.acquire())
        await asyncio.sleep(LOOK / 2)
        await first.release()
        await waiting
        return now()

    assert run(takeover()) == LOOK


def test_what_keeps_an_operator_from_leading_is_told_in_its_own_words(caplog: pytest.LogCaptureFixture) -> None:
    async def try_once() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ONE_TRY + LOOK / 2):
                await leader(Line(Server(), LOST), "one").acquire()

    run(try_once())
    assert "the lease cannot be had: no answer\n" in caplog.text
