"""`cloudai workers`, `status`."""

from __future__ import annotations

import click

from cloudai.cli.output import cluster_text, now, worker_table
from cloudai.cli.session import Session, client_command, json_flag


@click.command()
@json_flag
@client_command
async def workers(session: Session) -> None:
    """List workers with what is free on each."""
    document = await session.client.get("/api/workers")
    session.show(document, worker_table(document["workers"], now()))


@click.command()
@json_flag
@client_command
async def status(session: Session) -> None:
    """Show the cluster's totals."""
    document = await session.client.get("/api/cluster/status")
    session.show(document, cluster_text(document))
