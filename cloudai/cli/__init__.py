"""The `cloudai` command: the composition root, the only place that may import everything.

A command's module is imported when the command is named, not before: the client starts without the server's libraries,
and an agent holds none of the facade or of SQL.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

INTERRUPTED = 130  # as a shell has it of a program that Ctrl-C ended

COMMANDS: Mapping[str, str] = {
    "up": "cloudai.cli.serve:up",
    "api": "cloudai.cli.serve:api",
    "controller": "cloudai.cli.serve:controller",
    "agent": "cloudai.cli.serve:agent",
    "operator": "cloudai.cli.serve:operator",
    "submit": "cloudai.cli.submit:submit",
    "ps": "cloudai.cli.tasks:ps",
    "get": "cloudai.cli.tasks:get",
    "logs": "cloudai.cli.tasks:logs",
    "cancel": "cloudai.cli.tasks:cancel",
    "wait": "cloudai.cli.tasks:wait",
    "workers": "cloudai.cli.cluster:workers",
    "status": "cloudai.cli.cluster:status",
    "token": "cloudai.cli.token:token",
}


class LazyGroup(click.Group):
    """Commands by name, in the order of the table, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before the command took it upon itself
            ctx.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="cloudai")
def main() -> None:
    """Run container tasks on your own machines through one plain API.

    `cloudai up` starts everything on this machine; `cloudai submit` runs a task.
    """
