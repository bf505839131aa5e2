"""What the agent does next, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloudai.resources import GIB, Resources, Run, RunPhase
from cloudai_agent.reconcile import (
    Cause,
    Create,
    Fetch,
    Ordered,
    Remove,
    Start,
    Step,
    Stop,
    Tell,
    View,
    next_step,
)
from cloudai_agent.runtime import Container, ContainerState, Refusal

WISH = Run(
    task_id="task-1",
    attempt=1,
    worker_id="worker-1",
    user_id="user",
    image="image",
    command="true",
    resources=Resources(1000, GIB, GIB, 0),
)
CREATED = Container(run_id="task-1-1", task_id="task-1", attempt=1, state=ContainerState.CREATED)
RUNNING = replace(CREATED, state=ContainerState.RUNNING, started_at=1000)
EXITED = replace(RUNNING, state=ContainerState.EXITED, finished_at=5000, exit_code=0)
ASKED = replace(WISH, phase=RunPhase.STARTING)
NOW = 10_000


def step(wish: Run | None, container: Container | None, **known: Any) -> Step | None:
    return next_step(replace(View(wish=wish, container=container, now=NOW), **known))


def told(wish: Run, container: Container | None, **known: Any) -> tuple[RunPhase, str | None]:
    answer = step(wish, container, **known)
    assert isinstance(answer, Tell)
    return answer.phase, answer.reason


def test_a_new_run_fetches_creates_tells_and_only_then_starts() -> None:
    assert step(WISH, None) == Fetch()
    assert step(WISH, None, fetched=True) == Create()
    assert told(WISH, CREATED) == (RunPhase.STARTING, None)
    assert step(ASKED, CREATED) == Start()
    assert told(ASKED, RUNNING) == (RunPhase.RUNNING, None)


def test_a_running_container_needs_nothing() -> None:
    assert step(replace(WISH, phase=RunPhase.RUNNING), RUNNING) is None


def test_a_call_under_way_is_awaited() -> None:
    assert step(ASKED, CREATED, busy=True) is None


def test_a_pull_tells_how_far_it_is() -> None:
    answer = step(WISH, None, busy=True, progress="half")
    assert answer == Tell(phase=RunPhase.PULLING, message="half")
    known = replace(WISH, phase=RunPhase.PULLING, message="half")
    assert step(known, None, busy=True, progress="half") is None


def test_an_end_is_told_once_the_logs_are_stored() -> None:
    running = replace(WISH, phase=RunPhase.RUNNING)
    assert step(running, EXITED) is None
    assert told(running, EXITED, logs_stored=True) == (RunPhase.SUCCEEDED, None)


@pytest.mark.parametrize(
    ("container", "cause", "reason"),
    [
        (replace(EXITED, exit_code=3), None, "ExitCode"),
        (replace(EXITED, exit_code=127), None, "CommandNotFound"),
        (replace(EXITED, exit_code=137, oom_killed=True), None, "OOMKilled"),
        (replace(EXITED, exit_code=137), Cause.STORAGE, "StorageLimitExceeded"),
        (replace(EXITED, exit_code=143), Cause.DEADLINE, "DeadlineExceeded"),
    ],
)
def test_every_bad_end_has_its_reason(container: Container, cause: Cause | None, reason: str) -> None:
    ordered = cause and Ordered(cause, 4000)
    assert told(ASKED, container, ordered=ordered, logs_stored=True) == (RunPhase.FAILED, reason)


@pytest.mark.parametrize("cause", list(Cause))
def test_what_had_come_to_its_own_end_when_it_was_to_be_stopped_keeps_that_end(cause: Cause) -> None:
    ended = {"ordered": Ordered(cause, 5001), "logs_stored": True}
    wish = replace(WISH, phase=RunPhase.RUNNING, timeout_seconds=4)
    assert told(wish, EXITED, **ended) == (RunPhase.SUCCEEDED, None)
    assert told(wish, replace(EXITED, exit_code=3), **ended) == (RunPhase.FAILED, "ExitCode")


def test_what_ends_well_once_it_is_asked_to_stop_was_stopped() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING, timeout_seconds=4)
    answer = told(wish, EXITED, ordered=Ordered(Cause.DEADLINE, 5000), logs_stored=True)
    assert answer == (RunPhase.FAILED, "DeadlineExceeded")


def test_what_a_signal_ended_was_stopped_though_the_engine_has_another_clock() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING)
    ended = replace(EXITED, exit_code=143)
    assert told(wish, ended, ordered=Ordered(Cause.FENCED, 9000), logs_stored=True) == (RunPhase.LOST, "WorkerLost")


def test_a_deadline_stops_a_container_in_time() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING, timeout_seconds=9)
    assert step(wish, RUNNING) == Stop(Cause.DEADLINE)
    assert step(replace(wish, timeout_seconds=10), RUNNING) is None


def test_a_stop_that_is_due_does_not_wait_until_the_start_is_known() -> None:
    assert step(replace(ASKED, timeout_seconds=9), RUNNING) == Stop(Cause.DEADLINE)
    assert step(ASKED, RUNNING, ordered=Ordered(Cause.STORAGE, 5000)) == Stop(Cause.STORAGE)


def test_a_deadline_is_recognised_by_an_agent_that_did_not_set_it() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING, timeout_seconds=4)
    killed = replace(EXITED, exit_code=137)
    assert told(wish, killed, logs_stored=True) == (RunPhase.FAILED, "DeadlineExceeded")
    assert told(wish, replace(killed, exit_code=1), logs_stored=True) == (RunPhase.FAILED, "ExitCode")


def test_a_container_that_vanished_is_never_started_again() -> None:
    assert told(ASKED, None, fetched=True) == (RunPhase.FAILED, "ContainerGone")
    assert told(replace(WISH, phase=RunPhase.RUNNING), CREATED) == (RunPhase.FAILED, "ContainerGone")


def test_a_refusal_is_told() -> None:
    refusal = Refusal("ImageNotFound", "no such image")
    assert told(WISH, None, refusal=refusal) == (RunPhase.FAILED, "ImageNotFound")
    assert told(WISH, None, refusal=Refusal("WorkerLost", "the engine broke off")) == (RunPhase.LOST, "WorkerLost")


def test_a_start_that_failed_before_this_agents_life_is_told_as_the_engine_told_it() -> None:
    created = replace(CREATED, refusal=Refusal("CommandNotFound", "no such command"))
    assert told(ASKED, created) == (RunPhase.FAILED, "CommandNotFound")
    exited = replace(EXITED, started_at=None, exit_code=128, refusal=created.refusal)
    assert told(ASKED, exited, logs_stored=True) == (RunPhase.FAILED, "CommandNotFound")


def test_a_cancel_before_the_start_needs_no_container() -> None:
    wish = replace(WISH, stop_requested=True)
    assert told(wish, None) == (RunPhase.STOPPED, "Cancelled")
    assert told(replace(ASKED, stop_requested=True), CREATED) == (RunPhase.STOPPED, "Cancelled")


def test_a_cancel_stops_a_running_container_and_tells_when_it_has_ended() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING, stop_requested=True)
    assert step(wish, RUNNING) == Stop(Cause.CANCELLED)
    assert told(wish, replace(EXITED, exit_code=143), logs_stored=True) == (RunPhase.STOPPED, "Cancelled")


def test_what_nobody_wishes_is_stopped_and_removed() -> None:
    assert step(None, RUNNING) == Stop(None)
    assert step(None, EXITED) == Remove()
    assert step(None, CREATED) == Remove()
    assert step(None, None) is None


def test_a_fenced_worker_stops_and_starts_nothing() -> None:
    assert step(replace(WISH, phase=RunPhase.RUNNING), RUNNING, fenced=True) == Stop(Cause.FENCED)
    assert step(ASKED, CREATED, fenced=True) is None
    assert step(WISH, None, fenced=True, fetched=True) is None


def test_what_the_fence_stopped_was_lost() -> None:
    wish = replace(WISH, phase=RunPhase.RUNNING)
    lost = told(wish, replace(EXITED, exit_code=137), ordered=Ordered(Cause.FENCED, 4000), logs_stored=True)
    assert lost == (RunPhase.LOST, "WorkerLost")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "The command ended with exit code 3; see its logs."),
        (143, "The command ended with exit code 143 (signal 15); see its logs."),
        (
            137,
            "The command ended with exit code 137 (signal 9); see its logs, and raise req_memory if they break off "
            "without a cause.",
        ),
    ],
)
def test_an_exit_code_has_words_that_say_what_to_do(code: int, words: str) -> None:
    answer = step(replace(ASKED, phase=RunPhase.RUNNING), replace(EXITED, exit_code=code), logs_stored=True)
    assert isinstance(answer, Tell)
    assert answer.message == words
