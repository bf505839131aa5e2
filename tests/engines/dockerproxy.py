"""A socket in front of the Docker Engine's: it notes when each `create` request passes by, keeps requests waiting, and
answers wrongly in the engine's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

CREATE = "/containers/create"
START = r"/containers/[^/]+/start"
FAILED = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
    b'Content-Length: 33\r\n\r\n{"message": "it fell over later"}'
)
Look = Callable[[bytes], Coroutine[None, None, bytes]]


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

    def __init__(self, engine: str, *, tcp: bool = False) -> None:
        """On a Unix socket of its own, else on a port of loopback."""
        self._tcp = tcp
        self._engine = engine.removeprefix("unix://")
        self._directory = tempfile.TemporaryDirectory(prefix="proxy-", dir="/tmp")  # short: a socket's path has a limit
        self._path = Path(self._directory.name) / "docker.sock"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.host = f"unix://{self._path}"
        self.creates: list[float] = []
        self._held: list[Held] = []
        self._failing: re.Pattern[bytes] | None = None
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

    @contextlib.contextmanager
    def failing(self, path: str) -> Iterator[None]:
        """Within the block every `POST …PATH` (a pattern) is done by the engine, and the answer is that it failed."""
        self._failing = re.compile(rb"POST /v[0-9.]+" + path.encode() + rb"[? ]")
        try:
            yield
        finally:
            self._failing = None

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        if self._tcp:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.host = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
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
        wrong = asyncio.Event()  # the next answer is to be a failure
        up_reader, up_writer = await asyncio.open_unix_connection(self._engine)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by the end of the context
                await asyncio.gather(
                    passed(reader, up_writer, lambda data: self._look_at(data, wrong)),
                    passed(up_reader, writer, lambda data: self._answered(data, wrong)),
                )
        finally:
            self._serving.discard(serving)
            writer.close()
            up_writer.close()

    async def _look_at(self, data: bytes, wrong: asyncio.Event) -> bytes:
        if not data.startswith(b"POST "):
            return data
        for held in [each for each in self._held if each.path.match(data)]:
            held.arrived.set()
            await held.gone_on.wait()
        if CREATE.encode() in data[:200]:
            self.creates.append(time.monotonic())
        if self._failing and self._failing.match(data):
            wrong.set()
        return data

    async def _answered(self, data: bytes, wrong: asyncio.Event) -> bytes:
        if not wrong.is_set():
            return data
        wrong.clear()
        return FAILED


async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Look) -> None:
    """All that comes, as `look` gives it out."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(await look(data))
            await writer.drain()
    with contextlib.suppress(ConnectionError, OSError):
        writer.write_eof()
