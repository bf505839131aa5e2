"""`cloudai up`: the API, a controller and a worker in one process, and what it tells the person who started it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudai.api.hosts import is_loopback
from cloudai.cli.parts import announcement, run_until_signal, started_by, together
from cloudai.cli.place import digest, held_data_dir, listen, local_token, new_local_token, url_of
from cloudai.cli.serving import api_part, controller_part
from cloudai.cli.stores import opened_store, shown
from cloudai.settings import Settings

if TYPE_CHECKING:
    from cloudai.cli.working import LocalWorker

DEFAULT_URL = "http://127.0.0.1:8080"


def run_up(settings: Settings, *, with_agent: bool) -> None:
    with ExitStack() as held:
        directory = held.enter_context(held_data_dir(settings, "up"))
        listener = held.enter_context(listen(settings))
        worker = None
        if with_agent:
            from cloudai.cli.working import held_worker

            worker = held.enter_context(held_worker(settings))
        url = url_of(listener, settings.host)

        async def body(stop: asyncio.Event) -> None:
            listening = asyncio.Event()
            async with opened_store(settings) as store:
                token = local_token(directory)
                if token is None or not await store.has_token(digest(token)):  # none yet, or it was revoked
                    token = new_local_token(directory)
                    await store.add_token(digest(token), "up")
                parts = [api_part(store, settings, listener, listening), controller_part(store, settings)]
                if worker:
                    parts.append(started_by(listening, worker.agent(token, url).run))
                parts.append(announcement(listening, welcome(settings, url, worker)))
                await together(parts, stop)
            click.echo(farewell(worker))

        run_until_signal(body)


def welcome(settings: Settings, url: str, worker: LocalWorker | None) -> str:
    """The one block that says what runs, where, and what to type next."""
    lines = [
        "CloudAI is up.",
        "",
        f"  API       {url}  (reference at {url}/docs)",
        f"  Data      {settings.data_dir.absolute()}",
    ]
    if settings.database_url:
        lines.append(f"  Store     {shown(settings.url)}")
    lines += [f"  Worker    {_worker_line(worker)}", ""]
    warnings = [worker.choice.warning] if worker and worker.choice.warning else []
    if not is_loopback(settings.host):
        warnings.append(f"whoever reaches {settings.host} can run tasks here: the API asks for no password")
    lines += [f"  WARNING   {warning}" for warning in warnings] + [""] * bool(warnings)
    if url != DEFAULT_URL:
        lines.append(f"  First     export CLOUDAI_SERVER={url}")
    beside = Path(sys.executable).with_name("cloudai")  # where an installation puts it
    command = "cloudai" if shutil.which("cloudai") else os.path.relpath(beside)
    if worker is not None:
        lines.append(f"  Try       {command} submit --wait -i busybox -- 'echo hello from $(hostname)'")
    lines += [f"  {'Try' if worker is None else '':<10}{command} ps -a", "  Stop      Ctrl-C"]
    return "\n".join(lines)


def _worker_line(worker: LocalWorker | None) -> str:
    if worker is None:
        return "none here (--no-agent): join machines with `cloudai agent`, see docs/operations.md"
    return f"{worker.name}, runtime {worker.choice.runtime.kind}: {worker.choice.why}"


def farewell(worker: LocalWorker | None) -> str:
    if worker is None:
        return "CloudAI has stopped."
    return (
        "CloudAI has stopped. Tasks that were running go on; "
        "the next `cloudai up` with this data directory takes them up again."
    )
