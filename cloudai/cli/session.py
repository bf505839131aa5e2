"""What every client command shares: its server, its output for programs or people, and what its exit status means."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import click
import httpx

from cloudai.cli import INTERRUPTED
from cloudai.client import Client
from cloudai.errors import CloudAIError
from cloudai.transport import Unreachable

REFUSED = 1
UNREACHABLE = 3
NO_COMMAND = 127  # a shell's own word for a program that is not there
OWN_FAILURE = 125  # the task ended without an exit status of its own


@dataclass(frozen=True, slots=True)
class Session:
    """One command's way to the server and to its reader."""

    client: Client
    json: bool

    def show(self, document: Any, text: str) -> None:
        """The document for a program, or the text for a person."""
        click.echo(json.dumps(document, indent=2, ensure_ascii=False) if self.json else text)

    def tell(self, document: Any, text: str) -> None:
        """As `show`, but the text goes to standard error, where it stays out of a task's own output."""
        if self.json:
            self.show(document, text)
        else:
            click.echo(text, err=True)


json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON as the API gives it.")
Command = Callable[..., Awaitable[int | None]]


def _refuse_unknown() -> None:
    """A misspelled variable must not be passed over in silence."""
    if any(name.startswith("CLOUDAI_") and name != "CLOUDAI_SERVER" for name in os.environ):
        from cloudai.settings import SettingsError, refuse_unknown  # takes time that most calls need not spend

        try:
            refuse_unknown(os.environ)
        except SettingsError as error:
            raise click.UsageError(str(error)) from None


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
        reachable = bool(url.host) and (url.port is None or 0 < url.port < 65536)
        return url.scheme in ("http", "https") and reachable and not re.search(r"\s", text)
    except (httpx.InvalidURL, ValueError):
        return False


def _refuse_undecodable(arguments: dict[str, Any]) -> None:
    """Bytes that are no UTF-8 cannot be said to the API."""
    for name, value in arguments.items():
        for part in value if isinstance(value, tuple) else (value,):
            shown = part.encode(errors="backslashreplace").decode() if isinstance(part, str) else part
            if shown != part:
                raise click.UsageError(f"{name.replace('_', '-')} is not UTF-8 text: {shown}")


def client_command(body: Command) -> Callable[..., None]:
    """Give a command `--server`, a Session as its first argument, and an exit status (what the body returns; None is 0)."""

    @click.option(
        "--server",
        envvar="CLOUDAI_SERVER",
        default="http://127.0.0.1:8080",
        metavar="URL",
        help="The API.  [CLOUDAI_SERVER; default http://127.0.0.1:8080]",
    )
    @functools.wraps(body)
    def command(server: str, as_json: bool = False, **arguments: Any) -> None:
        _refuse_unknown()
        if not _is_url(server):
            raise click.UsageError(f"--server must be a URL such as http://master-node:8080, not {server!r}")
        _refuse_undecodable(arguments)
        try:
            status = asyncio.run(_in_session(body, server, as_json, arguments))
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Unreachable as error:
            click.echo(f"{error.message}. Start one with `cloudai up`, or say where it is with --server", err=True)
            status = UNREACHABLE
        except CloudAIError as error:
            click.echo(one_line(error), err=True)
            status = REFUSED
        except BrokenPipeError:
            raise  # whoever read has had enough
        except OSError as error:
            click.echo(f"The output cannot be written: {error.strerror}", err=True)
            status = REFUSED
        sys.exit(status or 0)

    return command


async def _in_session(body: Command, server: str, as_json: bool, arguments: dict[str, Any]) -> int | None:
    async with Client(server, notice=lambda text: click.echo(text, err=True)) as client:
        return await body(Session(client, as_json), **arguments)


def one_line(error: CloudAIError) -> str:
    """`Invalid request parameters: req_cpu must be greater than 0`."""
    details = dict(error.details)
    field, reason = details.pop("field", None), details.pop("reason", None)
    said = " ".join(str(part) for part in (field, reason) if part)
    rest = ", ".join(f"{key} {value}" for key, value in details.items())
    return ": ".join(part for part in (error.message, said, rest) if part)
