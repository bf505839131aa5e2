from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudai.api.explain import explain_inactive, explain_wish
from cloudai.resources import GIB, NOTHING, Reason, Resources, Task, TaskSpec, TaskStatus, Worker, WorkerState

NOW = 1_000_000
HEARTBEAT = 10_000


def state(
    name: str = "worker-1", allocated: Resources = NOTHING, gpu_free: tuple[int, ...] = (1000, 1000), **fields: Any
) -> WorkerState:
    worker = Worker(
        worker_id=name,
        identity="identity",
        address="host:1",
        capacity=Resources(8000, 16 * GIB, 100 * GIB, 2000),
        runtime="docker",
        registered_at=0,
        **{"last_heartbeat": NOW} | fields,
    )
    return WorkerState(worker=worker, allocated=allocated, runs=1, gpu_free=gpu_free)


def why(wish: Resources, *states: WorkerState) -> tuple[Reason, str]:
    waiting = explain_wish(wish, states, NOW, HEARTBEAT)
    return waiting.reason, waiting.message


def test_without_workers_it_says_how_to_get_one() -> None:
    assert why(Resources(1000, GIB, 0, 0)) == (
        Reason.NO_WORKERS,
        "No worker has joined: start an agent with `cloudai agent`.",
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"last_heartbeat": 0}, "worker-1 has not been heard of lately"),
        ({"ready": False, "problem": "its agent was stopped"}, "worker-1 says: its agent was stopped"),
    ],
)
def test_workers_that_do_not_answer_do_not_count(fields: dict[str, Any], words: str) -> None:
    reason, message = why(Resources(1000, GIB, 0, 0), state(**fields))
    assert reason is Reason.NO_WORKERS
    assert message == f"No worker is active: {words}."


@pytest.mark.parametrize(
    ("status", "lease", "then"),
    [
        (TaskStatus.PENDING, math.inf, "The task goes on there once the worker is back."),
        (TaskStatus.RUNNING, math.inf, "What runs there goes on as far as anybody can know."),
        (
            TaskStatus.PENDING,
            300.0,
            "If it stays away for longer than 310 s, this attempt counts as lost.",
        ),
    ],
)
def test_of_a_task_whose_worker_is_not_active_it_says_what_is_uncertain(
    status: TaskStatus, lease: float, then: str
) -> None:
    spec = TaskSpec(user_id="ann", image="busybox", command=None, resources=Resources(1000, GIB, 0, 0))
    task = Task(task_id="task-1", spec=spec, status=status, created_at=0, attempt=1, worker_id="worker-1")
    silent = state(last_heartbeat=0, lease=310_000).worker
    told = explain_inactive(task, silent, NOW, HEARTBEAT, lease)
    assert told.reason is Reason.WORKER_INACTIVE
    assert told.message.startswith("Worker worker-1 was last heard of 1000 s ago. ")
    assert told.message.endswith(then)
    there = state(ready=False, problem="the engine hangs").worker
    told = explain_inactive(task, there, NOW, HEARTBEAT, lease)
    assert told.message.startswith("Worker worker-1 was last heard of 0 s ago and said: the engine hangs. ")
    assert "lease" not in told.message


def test_what_is_short_is_told_with_its_amount() -> None:
    busy = state(allocated=Resources(7500, 15 * GIB, 0, 0))
    assert why(Resources(1000, 2 * GIB, 0, 0), busy) == (
        Reason.WAITING_FOR_CAPACITY,
        "Waits for room: worker-1 lacks 0.5 CPU and 1 GiB memory (1 task holds room there).",
    )


def test_what_no_worker_could_ever_hold_is_told() -> None:
    reason, message = why(Resources(9000, GIB, 0, 0), state())
    assert reason is Reason.TOO_LARGE
    assert "too small by 1 CPU" in message


def test_two_halves_are_not_a_whole_gpu() -> None:
    halves = state(allocated=Resources(0, 0, 0, 1000), gpu_free=(500, 500))
    reason, message = why(Resources(1000, GIB, 0, 1000), halves)
    assert reason is Reason.WAITING_FOR_CAPACITY
    assert "in one piece" in message


def test_many_workers_are_counted_not_listed() -> None:
    busy = [state(f"worker-{number}", Resources(8000, 0, 0, 0)) for number in range(100)]
    _, message = why(Resources(1000, GIB, 0, 0), *busy)
    assert "and 96 more" in message


def test_room_is_told_where_there_is_some() -> None:
    assert "worker-1 has room" in why(Resources(1000, GIB, 0, 0), state())[1]


@given(
    st.builds(Resources, st.integers(1, 10**5), st.integers(1, 2**40), st.integers(0, 2**40), st.integers(0, 4000)),
    st.lists(
        st.builds(
            lambda name, cpu: state(f"w{name}", Resources(cpu, 0, 0, 0)), st.integers(0, 99), st.integers(0, 8000)
        ),
        max_size=8,
    ),
)
def test_there_is_always_an_answer(wish: Resources, states: list[WorkerState]) -> None:
    reason, message = why(wish, *states)
    assert reason in (Reason.NO_WORKERS, Reason.TOO_LARGE, Reason.WAITING_FOR_CAPACITY)
    assert message.endswith(".")
