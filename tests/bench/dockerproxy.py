"""A Unix socket in front of the Docker Engine's that notes when each `create` request passes by."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path


class DockerProxy:
    """`creates`: the time (seconds, monotonic) at which each `POST …/containers/create` was sent to the engine."""

    def __init__(self, engine: str, path: Path) -> None:
        self.engine = engine.removeprefix("unix://")
        self.path = path
        self.creates: list[float] = []
        self.created = asyncio.Event()

    async def __aenter__(self) -> DockerProxy:
        self.server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self.engine)
        await asyncio.gather(self._pass(reader, up_writer, watch=True), self._pass(up_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if watch and data.startswith(b"POST ") and b"/containers/create" in data[:200]:
                    self.creates.append(time.monotonic())
                    self.created.set()
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError, OSError):
            writer.write_eof()
