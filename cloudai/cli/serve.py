"""`cloudai up`, `api`, `controller`, `agent`: the server parts, together or each alone.

Libraries of the facade and of SQL are imported by the commands that need them only.
"""

from __future__ import annotations

from typing import Any

import click

from cloudai.cli import logformat
from cloudai.cli.options import setting_flags, settings_from
from cloudai.cli.parts import run_until_signal
from cloudai.cli.place import StartRefused, read_token
from cloudai.settings import Settings

KUBERNETES = ("store", "namespace", "kubeconfig", "gpu_resource")  # settings that `up` has no use for


@click.command()
@setting_flags("api", "controller", "agent", without=frozenset({"server", "token_file", *KUBERNETES}))
@click.option("--no-agent", is_flag=True, help="Run no tasks on this machine; agents join from elsewhere.")
def up(no_agent: bool, **flags: Any) -> None:
    """Run the API, the controller and a worker on this machine, in the foreground."""
    settings = _prepared(flags)
    from cloudai.cli.up import run_up

    run_up(settings, with_agent=not no_agent)


@click.command()
@setting_flags("api")
def api(**flags: Any) -> None:
    """Run the API alone; a controller and agents run elsewhere."""
    settings = _prepared(flags)
    from cloudai.cli.serving import run_api

    run_api(settings)


@click.command()
@setting_flags("controller")
def controller(**flags: Any) -> None:
    """Run a controller alone; of several, one leads and the others wait."""
    settings = _prepared(flags)
    from cloudai.cli.serving import run_controller

    run_controller(settings)


@click.command()
@setting_flags("operator")
def operator(**flags: Any) -> None:
    """Run CloudAI's operator: it makes the tasks of a Kubernetes namespace into pods; of several, one leads."""
    settings = _prepared(flags)
    from cloudai.cli.operating import run_operator

    run_operator(settings)


@click.command()
@setting_flags("agent")
def agent(**flags: Any) -> None:
    """Run a worker that joins the API at --server and runs its tasks on this machine."""
    settings = _prepared(flags)
    token = _token(settings)
    from cloudai.cli.working import held_worker

    with held_worker(settings) as worker:
        click.echo(f"Worker {worker.name} joins {settings.server}; runtime {worker.choice}")
        joined = worker.agent(token)
        run_until_signal(joined.run)
        click.echo(f"Worker {worker.name} has stopped. {joined.what_goes_on() or ''}".strip())


def _prepared(flags: dict[str, Any]) -> Settings:
    settings = settings_from(flags)
    logformat.set_up(settings)
    return settings


def _token(settings: Settings) -> str:
    path = settings.token_file
    if path is None:
        raise click.UsageError(
            "the agent needs a join token: make one beside the API with `cloudai token create`, then --token-file FILE"
        )
    try:
        return read_token(path)
    except OSError as error:
        raise StartRefused(f"--token-file {path}: {error.strerror}") from None
