"""Following a task: its logs to standard output as they come, why it waits to standard error, its end as an exit status."""

from __future__ import annotations

import sys
from typing import Any

import click

from cloudai.cli.session import NO_COMMAND, OWN_FAILURE, Session
from cloudai.client import WAIT_SECONDS
from cloudai.errors import CloudAIError, Code
from cloudai.resources import Reason, TaskStatus

Task = dict[str, Any]


async def follow(session: Session, task_id: str) -> Task:
    """Every attempt's log, from its first byte, until the task has ended; the finished task.

    With `--json` standard output is for the document, and logs are left out.
    """
    shown = 0
    said = ""
    task = await session.client.task(task_id)
    while True:
        if task["attempt"] > shown and not session.json:
            shown += 1  # one after the other, though several may have ended since the last look
            if shown > 1:
                click.echo(f"{task_id}: attempt {shown}", err=True)
            data = b"\n"
            try:
                async for data in session.client.log(task_id, shown, follow=True):
                    write(data)
            except CloudAIError as error:
                if error.code is not Code.LOGS_REMOVED:
                    raise
                click.echo(f"{task_id}: {error.message}", err=True)
            if not data.endswith(b"\n") and sys.stdout is not None and sys.stdout.isatty():
                click.echo(err=True)  # what is said next has a line of its own
        elif ended(task):
            return task
        # A task that starts at once needs no words about its waiting.
        patience = 1 if task["status"] == TaskStatus.QUEUED and said == "" else WAIT_SECONDS
        before, task = task, await session.client.changed_task(task, patience)
        if task["status"] == TaskStatus.QUEUED and task["version"] == before["version"] and task["message"] != said:
            said = task["message"]
            click.echo(f"{task_id} waits: {said}", err=True)


def write(data: bytes) -> None:
    if sys.stdout is None:  # it was closed before the start
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def ended(task: Task) -> bool:
    return TaskStatus(task["status"]).terminal


def exit_status(task: Task) -> int:
    """The task's own exit status; without one that tells of failure a shell's for a missing program, or 125."""
    if task["status"] == TaskStatus.COMPLETED:
        return 0
    if task["reason"] == Reason.COMMAND_NOT_FOUND:
        return NO_COMMAND
    code = task["exit_code"] if task["status"] == TaskStatus.FAILED else None
    return code or OWN_FAILURE


def verdict(task: Task) -> str:
    """`task-1 failed: ExitCode: …` on one line."""
    why = ": ".join(part for part in (task["reason"], task["message"]) if part)
    return f"{task['task_id']} {task['status']}" + (f": {why}" if why else "")
