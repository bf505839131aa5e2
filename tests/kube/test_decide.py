"""What is decided of a Task on Kubernetes: by scenarios, and for any state of its Pods."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cloudai.resources import Reason, Resources, Run, RunPhase, Task, TaskSpec, TaskStatus, run_id
from cloudai.store.kube.task_resource import Attempt
from cloudai_controller.kube.decide import Decision, decide, vanished

GRACE = 60_000
NOW = 1_000_000
SPEC = TaskSpec(user_id="ann", image="image", command="true", resources=Resources(100, 1000, 0, 0))
TASK = Task(task_id="task-1", spec=SPEC, status=TaskStatus.QUEUED, created_at=1, version=1)


def run(attempt: int = 1, phase: RunPhase = RunPhase.ASSIGNED, **fields: object) -> Run:
    base = Run(
        task_id="task-1",
        attempt=attempt,
        worker_id="",
        user_id="ann",
        image="image",
        command=None,
        resources=SPEC.resources,
    )
    return replace(base, phase=phase, **fields)  # type: ignore[arg-type]


def decided(
    task: Task, *runs: Run, ended: tuple[Attempt, ...] = (), now: int = NOW, failing_since: int | None = None
) -> Decision:
    return decide(task, ended, {one.run_id: one for one in runs}, now, GRACE, failing_since)


RUNNING = replace(TASK, status=TaskStatus.RUNNING, attempt=1, worker_id="node", started_at=5)


def test_a_new_task_gets_a_pod_and_stays_queued_until_that_has_a_node() -> None:
    assert decided(TASK) == Decision(TASK, (), create=1)
    waits = decided(TASK, run(reason=Reason.UNSCHEDULABLE, message="no node"))
    assert (waits.task.status, waits.task.attempt, waits.task.reason) == (TaskStatus.QUEUED, 0, "Unschedulable")
    assert waits.create is None
    placed = decided(TASK, run(worker_id="node")).task
    assert (placed.status, placed.attempt, placed.worker_id) == (TaskStatus.PENDING, 1, "node")


def test_a_node_that_makes_no_place_for_the_pod_is_told_of_after_a_while() -> None:
    unprepared = run(worker_id="node", created_at=NOW, message="no sandbox")
    first = decided(TASK, unprepared)
    assert (first.task.status, first.look_at) == (TaskStatus.PENDING, NOW + GRACE)
    assert (first.task.reason, first.task.message) == (None, None)
    due = decided(first.task, unprepared, now=NOW + GRACE)
    assert (due.task.reason, due.task.message, due.delete, due.look_at) == ("WaitingForNode", "no sandbox", (), None)
    assert decided(due.task, unprepared, now=NOW + 2 * GRACE).task == due.task
    pulling = run(phase=RunPhase.PULLING, worker_id="node", reason=Reason.IMAGE_PULL_FAILED, message="no route")
    assert decided(due.task, pulling).task.reason == "ImagePullFailed"
    runs = decided(due.task, replace(unprepared, phase=RunPhase.RUNNING, message=None, started_at=NOW)).task
    assert (runs.status, runs.reason) == (TaskStatus.RUNNING, None)


def test_a_task_that_came_far_since_the_last_look_is_written_once() -> None:
    ended = run(phase=RunPhase.SUCCEEDED, worker_id="node", started_at=5, finished_at=9, exit_code=0)
    decision = decided(TASK, ended)
    task = decision.task
    assert (task.status, task.attempt, task.started_at, task.finished_at) == (TaskStatus.COMPLETED, 1, 5, 9)
    assert decision.ended == (Attempt(attempt=1, node="node", started_at=5, finished_at=9, exit_code=0),)


def test_whole_seconds_of_kubernetes_do_not_let_a_task_start_before_it_was_made() -> None:
    made = replace(TASK, created_at=10_100)
    ended = run(phase=RunPhase.SUCCEEDED, worker_id="node", started_at=10_000, finished_at=10_000, exit_code=0)
    decision = decided(made, ended)
    assert (decision.task.started_at, decision.task.finished_at) == (10_100, 10_100)
    assert decision.ended == (Attempt(attempt=1, node="node", started_at=10_100, finished_at=10_100, exit_code=0),)


def test_a_lost_attempt_is_followed_by_another_one_and_a_failed_one_is_not() -> None:
    lost = run(phase=RunPhase.LOST, worker_id="node", reason=Reason.WORKER_LOST)
    again = decided(RUNNING, lost)
    assert (again.task.status, again.task.attempt, again.create) == (TaskStatus.QUEUED, 1, 2)
    failed = run(phase=RunPhase.FAILED, worker_id="node", reason=Reason.EXIT_CODE, exit_code=1, started_at=5)
    assert decided(RUNNING, failed).task.status is TaskStatus.FAILED


def test_the_next_attempt_waits_until_the_one_before_is_over() -> None:
    requeued = replace(RUNNING, status=TaskStatus.QUEUED, worker_id=None, started_at=None)
    still = run(phase=RunPhase.RUNNING, worker_id="node", started_at=5)
    decision = decided(requeued, still, ended=(Attempt(attempt=1),))
    assert decision.create is None
    assert [one.run_id for one in decision.delete] == ["task-1-1"]


def test_a_cancelled_task_reads_so_when_its_pod_is_over() -> None:
    wished = replace(RUNNING, cancel_requested=True)
    live = decided(wished, run(phase=RunPhase.RUNNING, worker_id="node", started_at=5))
    assert (live.task.status, len(live.delete)) == (TaskStatus.RUNNING, 1)
    over = run(phase=RunPhase.FAILED, worker_id="node", started_at=5, reason=Reason.CONTAINER_GONE, exit_code=143)
    assert decided(wished, over).task.status is TaskStatus.CANCELLED
    assert decided(replace(TASK, cancel_requested=True)).task.status is TaskStatus.CANCELLED


def test_an_image_that_does_not_come_is_waited_for_then_noted_then_given_up() -> None:
    pulling = run(
        phase=RunPhase.PULLING, worker_id="node", reason=Reason.IMAGE_PULL_FAILED, message="no", created_at=1
    )  # which may come after a long time of pulling
    first = decided(TASK, pulling)
    assert (first.task.reason, first.delete, first.look_at) == ("ImagePullFailed", (), NOW + GRACE)
    assert decided(first.task, pulling, now=NOW + GRACE - 1, failing_since=NOW).delete == ()
    due = decided(first.task, pulling, now=NOW + GRACE, failing_since=NOW)
    assert due.delete == (pulling,)
    gone = replace(pulling, phase=RunPhase.FAILED, reason=Reason.CONTAINER_GONE, message="deleted", stop_requested=True)
    assert (decided(due.task, gone).task.status, decided(due.task, gone).task.reason) == (
        TaskStatus.FAILED,
        "ImagePullFailed",
    )


def test_an_attempt_that_is_there_goes_on_though_somebody_wrote_that_its_task_is_queued() -> None:
    there = run(phase=RunPhase.RUNNING, worker_id="node", started_at=5)
    told = replace(TASK, attempt=1, reason="Odd")
    goes_on = decided(told, there)
    assert (goes_on.task.status, goes_on.task.attempt, goes_on.task.reason) == (TaskStatus.RUNNING, 1, None)
    assert (goes_on.create, goes_on.delete) == (None, ())
    over = replace(there, phase=RunPhase.SUCCEEDED, finished_at=9, exit_code=0)
    assert decided(told, over).task.status is TaskStatus.COMPLETED
    # One that is listed is over and done with: the next one is made.
    again = decided(told, over, ended=(Attempt(attempt=1),))
    assert (again.task.status, again.create) == (TaskStatus.QUEUED, 2)


def test_a_pod_that_vanished_counts_as_lost() -> None:
    decision = decided(RUNNING, vanished(RUNNING))
    assert (decision.task.status, decision.create) == (TaskStatus.QUEUED, 2)


# -- whatever the state


NODES = st.sampled_from(["", "node"])
REASONS = st.sampled_from([None, *(reason.value for reason in Reason)])


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    found = []
    for attempt in draw(st.sets(st.integers(1, 4))):
        phase = draw(st.sampled_from(list(RunPhase)))
        began = draw(st.booleans()) or phase is RunPhase.RUNNING
        fields: dict[str, object] = {
            "worker_id": "node" if began else draw(NODES),
            "started_at": 5 if began else None,
            "reason": draw(REASONS),
            "stop_requested": draw(st.booleans()),
            "created_at": draw(st.sampled_from([0, NOW - 1, NOW])),
        }
        found.append(run(attempt, phase, **fields))
    return found


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    status = draw(st.sampled_from(list(TaskStatus)))
    attempt = draw(st.integers(0 if status is TaskStatus.QUEUED else 1, 4))
    return replace(
        TASK,
        spec=replace(SPEC, max_retries=draw(st.sampled_from([None, 0, 2]))),
        status=status,
        attempt=attempt,
        cancel_requested=draw(st.booleans()),
        worker_id="node" if status in (TaskStatus.PENDING, TaskStatus.RUNNING) else None,
        started_at=5 if status is TaskStatus.RUNNING else None,
        finished_at=9 if status.terminal else None,
        reason=draw(REASONS),
    )


def known(task: Task, found: list[Run]) -> dict[str, Run]:
    """The Pods, with the current one told of as vanished where it is not there, as the operator does."""
    seen = {one.run_id: one for one in found}
    current = run_id(task.task_id, task.attempt)
    if task.status in (TaskStatus.PENDING, TaskStatus.RUNNING) and current not in seen:
        seen[current] = vanished(task)
    return seen


@given(tasks(), runs())
def test_no_second_pod_is_made_while_one_may_live_and_none_for_a_cancelled_task(task: Task, found: list[Run]) -> None:
    seen = known(task, found)
    decision = decide(task, (), seen, NOW, GRACE)
    if decision.create is not None:
        assert not any(not one.phase.terminal for one in seen.values())
        assert not task.cancel_requested
        assert not task.status.terminal
        assert decision.task.status is TaskStatus.QUEUED
        assert decision.create == decision.task.attempt + 1


@given(tasks(), runs())
def test_a_terminal_status_never_changes_and_its_pods_are_ended(task: Task, found: list[Run]) -> None:
    decision = decide(task, (), known(task, found), NOW, GRACE)
    if task.status.terminal:
        assert decision.task == task
        assert {one.run_id for one in decision.delete} == {
            one.run_id for one in found if not one.phase.terminal and not one.stop_requested
        }


@given(tasks(), runs())
def test_once_carried_out_a_decision_asks_for_nothing_more(task: Task, found: list[Run]) -> None:
    seen = known(task, found)
    first = decide(task, (), seen, NOW, GRACE)
    for gone in first.delete:
        seen[gone.run_id] = replace(gone, stop_requested=True)
    if first.create is not None:
        made = run(first.create)
        seen[made.run_id] = made
    second = decide(first.task, first.ended, seen, NOW, GRACE)
    third = decide(second.task, second.ended, seen, NOW, GRACE)
    assert (third.task, third.create) == (second.task, None if second.create is None else second.create)
    assert not [one for one in second.delete if one.run_id in {gone.run_id for gone in first.delete}]


@given(tasks(), runs())
def test_nothing_is_cancelled_while_a_container_may_live(task: Task, found: list[Run]) -> None:
    seen = known(task, found)
    after = decide(task, (), seen, NOW, GRACE).task
    if after.status is TaskStatus.CANCELLED and task.status is not TaskStatus.CANCELLED:
        assert all(one.phase.terminal for one in seen.values())
