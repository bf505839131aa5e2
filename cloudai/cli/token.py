"""`cloudai token`: what lets a machine join as a worker. Works on the store itself, beside the API."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from cloudai.cli.options import setting_flags, settings_from
from cloudai.cli.place import digest, new_token


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
    from cloudai.cli.stores import opened_store, shown

    settings = settings_from(flags)
    made = new_token()

    async def store_it() -> None:
        async with opened_store(settings) as store:
            await store.add_token(digest(made), name)

    asyncio.run(store_it())
    if as_json:
        import json

        click.echo(json.dumps({"name": name, "token": made}))
        return
    click.echo(made)
    click.echo(f"Join token `{name}`, kept in {shown(settings.url)}; it is shown only now.", err=True)
