"""`cloudai ps`, `get`, `logs`, `cancel`, `wait`."""

from __future__ import annotations

import click

from cloudai.cli.follow import ended, exit_status, follow, verdict, write
from cloudai.cli.output import now, task_details, task_table
from cloudai.cli.session import REFUSED, Session, client_command, json_flag, one_line
from cloudai.client import task_path
from cloudai.errors import CloudAIError
from cloudai.resources import TaskStatus
from cloudai.transport import Unreachable

ACTIVE = (TaskStatus.RUNNING, TaskStatus.PENDING, TaskStatus.QUEUED)


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Finished tasks too.")
@click.option("--status", type=click.Choice([status.value for status in TaskStatus]), help="Those with this status.")
@click.option("--user", help="Those of this user.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Newest of each status.")
@json_flag
@client_command
async def ps(session: Session, everything: bool, status: str | None, user: str | None, limit: int) -> None:
    """List tasks that are not finished, newest first."""
    statuses: list[str | None] = [status] if status else [None] if everything else list(ACTIVE)
    tasks = []
    total = 0
    for wanted in statuses:
        query = {"view": "full", "limit": limit, "status": wanted, "user_id": user}
        page = await session.client.get(
            "/api/tasks", {name: value for name, value in query.items() if value is not None}
        )
        tasks += page["tasks"]
        total += page["total"]
    more = f"\n… {total - len(tasks)} more; --limit shows more" if total > len(tasks) else ""
    session.show({"tasks": tasks, "total": total}, task_table(tasks, now()) + more)


@click.command()
@click.argument("task_id")
@json_flag
@client_command
async def get(session: Session, task_id: str) -> None:
    """Show one task."""
    task = await session.client.task(task_id)
    session.show(task, task_details(task))


@click.command()
@click.argument("task_id")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the task has ended.")
@click.option("--attempt", type=click.IntRange(1), help="An earlier attempt  [default: the latest]")
@client_command
async def logs(session: Session, task_id: str, following: bool, attempt: int | None) -> None:
    """Print what a task has written, both streams together."""
    if following and attempt is None:
        await follow(session, task_id)
        return
    async for data in session.client.log(task_id, attempt, follow=following):
        write(data)


@click.command()
@click.argument("task_ids", metavar="TASK_ID…", nargs=-1, required=True)
@json_flag
@client_command
async def cancel(session: Session, task_ids: tuple[str, ...]) -> int:
    """End tasks. The answer comes at once; a task reads `cancelled` once its container is gone."""
    refused = False
    for task_id in task_ids:
        try:
            answer = await session.client.post(f"{task_path(task_id)}/cancel")
        except Unreachable:
            raise
        except CloudAIError as error:  # the others are cancelled all the same
            click.echo(one_line(error), err=True)
            refused = True
        else:
            session.show(answer, f"{task_id}: {answer['message']}")
    return REFUSED if refused else 0


@click.command()
@click.argument("task_ids", metavar="TASK_ID…", nargs=-1, required=True)
@json_flag
@client_command
async def wait(session: Session, task_ids: tuple[str, ...]) -> int:
    """Wait until tasks have ended; exits with the first exit status that is not 0, as `submit --wait` does."""
    statuses = []
    for task_id in task_ids:
        task = await session.client.task(task_id)
        while not ended(task):
            task = await session.client.changed_task(task)
        session.show(task, verdict(task))
        statuses.append(exit_status(task))
    return next((status for status in statuses if status), 0)
