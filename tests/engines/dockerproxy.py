"""A Unix socket in front of the Docker Engine's: it notes when each `create` request passes by, and keeps requests waiting."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

CREATE = "/containers/create"
START = r"/containers/[^/]+/start"


@dataclass
class Held:
    """A kind of request that does not reach the engine until `release`. `arrived` is set once one waits."""

    path: re.Pattern[bytes]
    arrived: threading.Event = field(default_factory=threading.Event)
    gone_on: asyncio.Event = field(default_factory=asyncio.Event)


class DockerProxy:
    """A context, served by a thread of its own; `host` is its DOCKER_HOST.

    `creates`: the time (seconds, monotonic) at which each `POST …/containers/create` was sent to the engine.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine.removeprefix("unix://")
        self._directory = tempfile.TemporaryDirectory(prefix="proxy-", dir="/tmp")  # short: a socket's path has a limit
        self._path = Path(self._directory.name) / "docker.sock"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.host = f"unix://{self._path}"
        self.creates: list[float] = []
        self._held: list[Held] = []
        self._serving: set[asyncio.Task[None]] = set()

    def __enter__(self) -> DockerProxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._directory.cleanup()

    @contextlib.contextmanager
    def holding(self, path: str) -> Iterator[threading.Event]:
        """Within the block every `POST …PATH` (a pattern) waits; yields the event that one has come. After it they go on."""
        held = Held(re.compile(rb"POST /v[0-9.]+" + path.encode() + rb"[? ]"))
        self._held.append(held)
        try:
            yield held.arrived
        finally:
            self._held.remove(held)
            self._loop.call_soon_threadsafe(held.gone_on.set)

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._serve, self._path)
        self._ready.set()
        await self._ended.wait()
        server.close()
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        up_reader, up_writer = await asyncio.open_unix_connection(self._engine)
        try:
            await asyncio.gather(self._pass(reader, up_writer, watch=True), self._pass(up_reader, writer))
        finally:
            self._serving.discard(serving)
            writer.close()
            up_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if watch and data.startswith(b"POST "):
                    await self._look_at(data)
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError, OSError):
            writer.write_eof()

    async def _look_at(self, data: bytes) -> None:
        for held in [each for each in self._held if each.path.match(data)]:
            held.arrived.set()
            await held.gone_on.wait()
        if CREATE.encode() in data[:200]:
            self.creates.append(time.monotonic())
