"""A client that costs little: raw requests over kept-alive connections, so that what is measured is the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator

PATIENCE = 60.0  # seconds for one answer


async def load(port: int, requests: Iterable[bytes], connections: int, count: int) -> float:
    """Send the first `count` of `requests` over `connections` connections, one at a time on each; the seconds it took.

    Raises AssertionError for an answer that is not a 200 with a Content-Length.
    """
    source = iter(requests)
    turns = iter(range(count))
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    began = time.perf_counter()
    await asyncio.gather(*(_one(reader, writer, source, turns) for reader, writer in streams))
    seconds = time.perf_counter() - began
    for _, writer in streams:
        writer.close()
        await writer.wait_closed()
    return seconds


async def _one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: Iterator[bytes], turns: Iterator[int]
) -> None:
    for _ in turns:
        writer.write(next(source))
        async with asyncio.timeout(PATIENCE):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
