"""Documents as text for people, and a task's end as an exit status."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cloudai.cli.follow import exit_status, verdict
from cloudai.cli.output import age, cluster_text, table, task_details, task_table, worker_table
from cloudai.cli.session import one_line
from cloudai.errors import CloudAIError, Code, invalid

NOW = datetime(2025, 11, 16, 12, 0, 0, tzinfo=UTC)


def task(**fields: Any) -> dict[str, Any]:
    return {
        "task_id": "task-1",
        "user_id": "ada",
        "docker_image": "busybox",
        "command": "true",
        "req_cpu": 1.0,
        "req_memory": 0.25,
        "req_storage": 0.0,
        "req_gpu": 0.0,
        "status": "running",
        "created_at": "2025-11-16T11:00:00Z",
        "started_at": "2025-11-16T11:00:05Z",
        "finished_at": None,
        "worker_id": "worker-1",
        "attempt": 1,
        "cancel_requested": False,
        "exit_code": None,
        "reason": None,
        "message": None,
    } | fields


def test_columns_are_as_wide_as_what_they_hold() -> None:
    assert table(("A", "B"), [("long", "x"), ("s", "")]) == "A     B\nlong  x\ns"


def test_a_waiting_task_shows_why_on_its_row() -> None:
    text = task_table([task(status="queued", worker_id=None, message="4 CPU are short")], NOW)
    assert text.splitlines()[1] == "task-1  queued  ada   busybox  -       60m  4 CPU are short"


def test_a_task_whose_end_is_wished_reads_cancelling() -> None:
    assert "cancelling" in task_table([task(cancel_requested=True)], NOW)
    assert "cancelling" not in task_table([task(cancel_requested=True, status="cancelled")], NOW)


def test_details_leave_out_what_has_no_value() -> None:
    text = task_details(task())
    assert "Requests   1 CPU, 0.25 GiB memory" in text
    assert "Exit code" not in text


def test_details_show_a_list_as_words_and_an_exit_code_of_0() -> None:
    text = task_details(task(command=["echo", "a b"], exit_code=0, req_gpu=0.5))
    assert "Command    echo 'a b'" in text
    assert "Exit code  0" in text
    assert "0.5 GPU" in text


def test_workers_show_what_is_free() -> None:
    kinds = {f"{side}_{kind}": 2.0 for side in ("available", "total") for kind in ("cpu", "memory", "storage", "gpu")}
    worker = {
        "worker_id": "w",
        "is_active": False,
        "last_heartbeat": int(NOW.timestamp()) - 90,
        "problem": "dockerd is away",
    }
    text = worker_table([worker | kinds], NOW)
    assert "inactive" in text
    assert "2/2" in text
    assert "90s ago" in text
    assert "dockerd is away" in text


def test_the_cluster_is_shown_in_totals() -> None:
    kinds = {f"{side}_{kind}": 2.0 for side in ("available", "total") for kind in ("cpu", "memory", "storage", "gpu")}
    counts = {"total_tasks": 3, "running_tasks": 1, "queued_tasks": 0, "completed_tasks": 2}
    text = cluster_text({"total_workers": 1, "active_workers": 1} | kinds | counts)
    assert text.splitlines()[-1] == "Tasks      3: 1 running, 0 queued, 2 completed"


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200000, "2d")])
def test_an_age_is_short(seconds: int, text: str) -> None:
    then = datetime.fromtimestamp(NOW.timestamp() - seconds, UTC)
    assert age(then.isoformat(), NOW) == text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"status": "completed", "exit_code": 0}, 0),
        ({"status": "failed", "exit_code": 3}, 3),
        ({"status": "failed", "exit_code": 137, "reason": "OOMKilled"}, 137),
        ({"status": "failed", "exit_code": None, "reason": "ImageNotFound"}, 125),
        ({"status": "failed", "exit_code": 0, "reason": "StorageLimitExceeded"}, 125),
        ({"status": "cancelled", "exit_code": 143}, 125),
    ],
)
def test_a_task_ends_as_an_exit_status(fields: dict[str, Any], status: int) -> None:
    assert exit_status(task(**fields)) == status


def test_a_verdict_is_one_line() -> None:
    assert verdict(task(status="completed")) == "task-1 completed"
    assert (
        verdict(task(status="failed", reason="OOMKilled", message="ask for more"))
        == "task-1 failed: OOMKilled: ask for more"
    )


def test_an_error_is_one_line_with_field_and_reason() -> None:
    assert one_line(invalid("req_cpu", "must be greater than 0")) == (
        "Invalid request parameters: req_cpu must be greater than 0"
    )
    assert (
        one_line(CloudAIError(Code.TASK_NOT_FOUND, "Task not found", {"task_id": "t"})) == "Task not found: task_id t"
    )
