"""`cloudai token`: what lets a machine join as a worker. Works on the store itself, beside the API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloudai.cli.options import setting_flags, settings_from
from cloudai.cli.place import StartRefused, digest, new_token

if TYPE_CHECKING:
    from cloudai.settings import Settings
    from cloudai.store.protocol import Store, Token

T = TypeVar("T")
LONGEST_NAME = 63
SHOWN = 12  # hexadecimal digits of a digest: enough to tell tokens apart


@click.group()
def token() -> None:
    """Join tokens for agents."""


@token.command()
@setting_flags("data_dir", "database_url")
@click.argument("name", default="worker")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def create(name: str, as_json: bool, **flags: Any) -> None:
    """Make a join token and print it, this once; the store keeps only its digest.

    Run it where the API runs, with the same settings. NAME is a note for people.
    """
    from cloudai.cli.stores import shown

    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise click.UsageError(f"NAME must be a line of at most {LONGEST_NAME} characters that is not empty")
    settings = settings_from(flags)
    made, is_new = new_token(), _is_missing(settings)
    _at_store(settings, lambda store: store.add_token(digest(made), name))
    if as_json:
        import json

        click.echo(json.dumps({"name": name, "token": made}))
        return
    click.echo(made)
    click.echo(f"Join token `{name}`, kept in {shown(settings.url)}; it is shown only now.", err=True)
    if is_new:
        click.echo("That store is new; an API that runs already has another one.", err=True)


@token.command("list")
@setting_flags("data_dir", "database_url")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_(as_json: bool, **flags: Any) -> None:
    """Print the join tokens there are, the oldest first: an ID, the note for people, the age. Never the token itself."""
    from cloudai.api.convert import instant
    from cloudai.cli.output import age, now, table

    found = _at_known_store(settings_from(flags), lambda store: store.list_tokens())
    made = [(_id(one), one.name, instant(one.created_at)) for one in found]
    if as_json:
        import json

        click.echo(json.dumps([{"id": key, "name": name, "created_at": at} for key, name, at in made]))
        return
    click.echo(table(("ID", "NAME", "AGE"), [(key, name, age(at, now())) for key, name, at in made]))


@token.command()
@setting_flags("data_dir", "database_url")
@click.argument("key", metavar="ID")
def revoke(key: str, **flags: Any) -> None:
    """Let nobody join any more with the token that `cloudai token list` shows under ID.

    Agents that joined with it are cut off within half a minute; their tasks go on until the end of the lease.
    """
    from cloudai.cli.stores import shown

    settings = settings_from(flags)

    async def remove(store: Store) -> Token:
        found = [one for one in await store.list_tokens() if _id(one) == key]
        if not found or not await store.remove_token(found[0].digest):
            raise click.ClickException(
                f"there is no join token {key} in {shown(settings.url)}; `cloudai token list` shows those there are"
            )
        return found[0]

    removed = _at_known_store(settings, remove)
    click.echo(f"Join token {key} (`{removed.name}`) lets nobody join any more.", err=True)


def _id(token: Token) -> str:
    return token.digest.hex()[:SHOWN]


def _is_missing(settings: Settings) -> bool:
    """Whether the store is a file that is not there."""
    from cloudai.store.engine import sqlite_file

    file = sqlite_file(settings.url)
    with contextlib.suppress(PermissionError):  # which is told when it is opened
        return file is not None and not file.exists()
    return False


def _at_known_store(settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    """Of a store that is not there yet, nobody has a token."""
    from cloudai.cli.stores import shown

    if _is_missing(settings):
        raise StartRefused(
            f"there is no store {shown(settings.url)}; --data-dir or --database-url says where the API's is"
        )
    return _at_store(settings, work)


def _at_store(settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    from cloudai.cli.stores import opened_store

    async def run() -> T:
        async with opened_store(settings) as store:
            return await work(store)

    return asyncio.run(run())
