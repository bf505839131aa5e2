"""A Unix socket in front of the Docker Engine's that notes when each `create` request passes by."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType


class DockerProxy:
    """A context, served by a thread of its own; `host` is its DOCKER_HOST.

    `creates`: the time (seconds, monotonic) at which each `POST …/containers/create` was sent to the engine.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine.removeprefix("unix://")
        self._directory = tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")  # short: a socket's path has a limit
        self._path = Path(self._directory.name) / "docker.sock"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.host = f"unix://{self._path}"
        self.creates: list[float] = []
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
                if watch and data.startswith(b"POST ") and b"/containers/create" in data[:200]:
                    self.creates.append(time.monotonic())
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError, OSError):
            writer.write_eof()
