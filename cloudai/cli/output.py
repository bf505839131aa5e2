"""Documents of the API as text for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cloudai.resources import Reason

Document = Mapping[str, Any]

TASK_FIELDS = (
    ("Reason", "reason"),
    ("Message", "message"),
    ("Exit code", "exit_code"),
    ("User", "user_id"),
    ("Image", "docker_image"),
    ("Command", "command"),
    ("Worker", "worker_id"),
    ("Attempt", "attempt"),
    ("Created", "created_at"),
    ("Started", "started_at"),
    ("Finished", "finished_at"),
)
UNCERTAIN = (Reason.WORKER_INACTIVE, Reason.NO_CONTROLLER)  # of a task that runs; the message says more


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as what they hold, the last one as it is."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def task_table(tasks: Iterable[Document], now: datetime) -> str:
    head = ("TASK", "STATUS", "USER", "IMAGE", "WORKER", "AGE", "WHY")
    return table(head, [_task_row(task, now) for task in tasks])


def _task_row(task: Document, now: datetime) -> tuple[str, ...]:
    told = task["status"] in ("queued", "pending", "failed") or task.get("reason") in UNCERTAIN
    why = task.get("message") if told else ""
    return (
        task["task_id"],
        _status(task),
        task["user_id"],
        _short(task["docker_image"], 40),
        task["worker_id"] or "-",
        age(task["created_at"], now),
        _short(why or task.get("reason") or "", 80),
    )


def _status(task: Document) -> str:
    ending = task.get("cancel_requested") and task["status"] in ("pending", "running")
    return "cancelling" if ending else str(task["status"])


def task_details(task: Document) -> str:
    """One field a line; those without a value are left out."""
    fields = [("Status", _status(task)), *((label, task.get(name)) for label, name in TASK_FIELDS)]
    wish = f"{task['req_cpu']:g} CPU, {task['req_memory']:g} GiB memory"
    if task["req_storage"]:
        wish += f", {task['req_storage']:g} GiB storage"
    if task["req_gpu"]:
        wish += f", {task['req_gpu']:g} GPU"
    lines = [("Task", task["task_id"]), *fields, ("Requests", wish)]
    return "\n".join(f"{label:<10} {_value(value)}" for label, value in lines if value is not None)


def worker_table(workers: Iterable[Document], now: datetime) -> str:
    head = ("WORKER", "STATE", "RUNTIME", "CPU FREE", "MEMORY FREE", "STORAGE FREE", "GPU FREE", "HEARTBEAT", "PROBLEM")
    rows = []
    for worker in workers:
        room = [
            f"{worker[f'available_{kind}']:.4g}/{worker[f'total_{kind}']:.4g}"
            for kind in ("cpu", "memory", "storage", "gpu")
        ]
        heard = f"{_span(now.timestamp() - worker['last_heartbeat'])} ago"
        state = "active" if worker["is_active"] else "inactive"
        rows.append(
            (
                worker["worker_id"],
                state,
                worker.get("runtime") or "-",
                *room,
                heard,
                _short(worker.get("problem") or "", 60),
            )
        )
    return table(head, rows)


def cluster_text(status: Document) -> str:
    lines = [f"Workers    {status['active_workers']} active of {status['total_workers']}"]
    for label, kind, unit in (
        ("CPU", "cpu", " cores"),
        ("Memory", "memory", " GiB"),
        ("Storage", "storage", " GiB"),
        ("GPU", "gpu", ""),
    ):
        lines.append(f"{label:<10} {status[f'available_{kind}']:.4g} of {status[f'total_{kind}']:.4g}{unit} free")
    counts = [
        f"{status[name]} {name.removesuffix('_tasks')}"
        for name in status
        if name.endswith("_tasks") and name != "total_tasks"
    ]
    lines.append(f"Tasks      {status['total_tasks']}: {', '.join(counts)}")
    return "\n".join(lines)


def age(instant: str, now: datetime) -> str:
    return _span((now - datetime.fromisoformat(instant)).total_seconds())


def now() -> datetime:
    return datetime.now(UTC)


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _value(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value)
