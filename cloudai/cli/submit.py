"""`cloudai submit`."""

from __future__ import annotations

import asyncio
import getpass
import math
import re
import secrets
from typing import Any

import click

from cloudai.cli.follow import exit_status, follow, verdict
from cloudai.cli.session import Session, client_command, json_flag


def finite(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a finite number", param=parameter)
    return value


def visible(_: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", value):
        raise click.BadParameter("must be 1 to 255 visible ASCII characters", param=parameter)
    return value


def this_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


@click.command(context_settings={"allow_interspersed_args": False})  # what follows the first word is the task's
@click.option("-i", "--image", required=True, help="Image to run.")
@click.option("--cpu", type=float, default=1, show_default=True, callback=finite, help="Cores; also the limit.")
@click.option("--memory", type=float, default=0.25, show_default=True, callback=finite, help="GiB; also the limit.")
@click.option(
    "--storage", type=float, default=0, show_default=True, callback=finite, help="GiB written at most; 0 for no limit."
)
@click.option(
    "--gpu", type=float, default=0, show_default=True, callback=finite, help="GPUs; fractions share a device."
)
@click.option("--user", default=this_user, show_default="your login name", help="Whose task it is.")
@click.option("--timeout-seconds", type=int, help="Stop it when it has run that long.")
@click.option(
    "--max-retries", type=int, help="Further attempts, whatever ended one  [default: 1 for a lost worker, 0 else]"
)
@click.option(
    "--idempotency-key",
    callback=visible,
    help="Repeating a submit with the same key makes no second task  [default: a new key]",
)
@click.option("--wait", is_flag=True, help="Show its logs (with --json: none), then exit with its exit status.")
@click.argument("command", nargs=-1, metavar="[--] [COMMAND]...")
@json_flag
@client_command
async def submit(
    session: Session, command: tuple[str, ...], wait: bool, idempotency_key: str | None, **wish: Any
) -> int:
    """Run a task: cloudai submit -i IMAGE [OPTIONS] -- COMMAND…

    One word is a line for the image's shell; several are a program and its arguments, run as they are; none leaves the
    image's own command. Prints the task's id.

    With --wait: the exit status is the task's; 127 if there was no such program, 125 if it ended without one (cancelled,
    image not found, …), 130 on Ctrl-C, which leaves the task running.
    """
    if command and not command[0]:
        raise click.UsageError("COMMAND must not be empty; leave it out for the image's own")
    key = idempotency_key or secrets.token_hex(16)
    try:
        answer = await session.client.post("/api/tasks", body=_body(command, wish), headers={"Idempotency-Key": key})
    except asyncio.CancelledError:
        click.echo(
            f"\nIt may have been submitted; the same command with --idempotency-key {key} makes no second task",
            err=True,
        )
        raise
    task_id = answer["task_id"]
    if not wait:
        try:
            session.show(answer, task_id)
        except OSError:
            click.echo(f"{task_id} submitted", err=True)
            raise
        return 0
    click.echo(f"{task_id} submitted", err=True)
    try:
        task = await follow(session, task_id)
    except asyncio.CancelledError:
        click.echo(f"\n{task_id} goes on; `cloudai cancel {task_id}` ends it", err=True)
        raise
    session.tell(task, verdict(task))
    return exit_status(task)


def _body(command: tuple[str, ...], wish: dict[str, Any]) -> dict[str, Any]:
    body = {
        "user_id": wish["user"],
        "docker_image": wish["image"],
        "req_cpu": wish["cpu"],
        "req_memory": wish["memory"],
        "req_storage": wish["storage"],
        "req_gpu": wish["gpu"],
    }
    if command:
        body["command"] = command[0] if len(command) == 1 else list(command)
    return body | {name: wish[name] for name in ("timeout_seconds", "max_retries") if wish[name] is not None}
