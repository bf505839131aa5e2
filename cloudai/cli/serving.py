"""The API and the controller as parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

import click
import uvicorn

from cloudai.api.app import create_app
from cloudai.cli.malformed import Http
from cloudai.cli.parts import Part, announcement, run_until_signal, together, unless
from cloudai.cli.place import StartRefused, listen, url_of
from cloudai.cli.stores import opened_facade_store, opened_store, place_of, shown
from cloudai.settings import Settings, SettingsError
from cloudai.store.protocol import FacadeStore, Store
from cloudai.wire import MAX_FRAME
from cloudai_controller.loop import Controller

CLOSING_SECONDS = 5  # how long open requests may take to end once the API stops


def run_api(settings: Settings) -> None:
    with listen(settings) as listener:

        async def body(stop: asyncio.Event) -> None:
            listening = asyncio.Event()
            text = f"The API listens on {url_of(listener, settings.host)}, store {place_of(settings)}"
            async with contextlib.AsyncExitStack() as ends:
                store = await unless(stop, ends.enter_async_context(opened_facade_store(settings)))
                if store is not None:
                    api = api_part(store, settings, listener, listening)
                    await together([api, announcement(listening, text)], stop)

        run_until_signal(body)


def run_controller(settings: Settings) -> None:
    async def body(stop: asyncio.Event) -> None:
        async with opened_store(settings) as store:
            click.echo(f"The controller works on store {shown(settings.url)}")
            await controller_part(store, settings)(stop)

    run_until_signal(body)


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's signals alone and tells when it listens."""

    def __init__(self, config: uvicorn.Config, listening: asyncio.Event) -> None:
        super().__init__(config)
        self._listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()


def api_part(store: FacadeStore, settings: Settings, listener: socket.socket, listening: asyncio.Event) -> Part:
    """The facade on `listener`; sets `listening` once requests are answered."""
    try:
        app = create_app(store, settings)
    except SettingsError as error:
        raise StartRefused(str(error)) from None

    async def run(stop: asyncio.Event) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # the facade itself decides which forwarded addresses it believes
            server_header=False,
            lifespan="on",
            http=Http,
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,  # costs more than it saves where a message goes to many
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        server = _Server(config, listening)
        serving = asyncio.ensure_future(server.serve([listener]))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        app.end_waits()
        server.should_exit = True
        await serving

    return run


def controller_part(store: Store, settings: Settings) -> Part:
    holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return Controller(store, settings, holder).run
