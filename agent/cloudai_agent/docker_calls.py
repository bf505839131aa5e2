"""What an engine's silence and its errors mean, and how its streams are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
import urllib3
from docker.errors import APIError, DockerException

from cloudai.keepalive import KEEPALIVE
from cloudai_agent.runtime import EngineDown

CALL_SECONDS = 60  # the longest that the engine may take over one call
FULL_FRAME = 16 * 1024  # bytes after which the engine cuts a line of a log into parts

_GOING_AWAY = (
    "containerd.sock",
    "shutting down",
    "transport is closing",
    "ttrpc: closed",
    "context deadline exceeded",
    "context canceled",
)


class KeptAlive(requests.adapters.HTTPAdapter):
    """Connections to an engine that may be elsewhere, and vanish without a word."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        options["socket_options"] = [*urllib3.connection.HTTPConnection.default_socket_options, *KEEPALIVE]
        super().init_poolmanager(*arguments, **options)


@contextmanager
def answering() -> Iterator[None]:
    """Turns an engine that does not answer into EngineDown; its refusals of single calls pass through as APIError."""
    try:
        yield
    except APIError as error:
        if going_away(error):
            raise EngineDown(f"The Docker engine is shutting down: {engine_words(error)}") from None
        raise
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, DockerException) as error:
        raise EngineDown(f"The Docker engine does not answer ({_cause(error)})") from None


def engine_words(error: APIError) -> str:
    """What the engine said, in one line."""
    return " ".join(str(error.explanation or error).split())


def going_away(error: APIError) -> bool:
    """Whether it says nothing of the one call, but that the engine, or containerd behind it, stops or hangs."""
    words = engine_words(error)
    if "http://" in words or "https://" in words:
        return False  # it waited for a registry in vain, of which it speaks in the same words
    return error.is_server_error() and any(sign in words for sign in _GOING_AWAY)


def _cause(error: BaseException) -> str:
    """The innermost error says it shortest."""
    if isinstance(error, requests.Timeout):
        return "nothing came in time"
    text = str(error)
    for sign in ("FileNotFoundError", "ConnectionRefusedError", "PermissionError"):
        if sign in text:
            return {
                "FileNotFoundError": "there is no socket",
                "ConnectionRefusedError": "connection refused",
                "PermissionError": "no permission for its socket; join the group `docker` or run as root",
            }[sign]
    return text.partition("\n")[0][:200]


def stream_payloads(response: requests.Response) -> Iterator[bytes]:
    """The bytes of both streams of a log, in the order in which the engine has them; each frame has a head of 8 bytes."""
    buffer = bytearray()
    unended: set[int] = set()  # streams in the middle of a line that takes several frames
    for data in response.iter_content(chunk_size=None):
        buffer += data
        start, pieces = 0, []
        while len(buffer) >= start + 8:
            stream, end = buffer[start], start + 8 + int.from_bytes(buffer[start + 4 : start + 8], "big")
            if len(buffer) < end:
                break
            pieces.append(_line_part(bytes(buffer[start + 8 : end]), stream, unended))
            start = end
        del buffer[:start]
        if pieces:
            yield b"".join(pieces)


def _line_part(part: bytes, stream: int, unended: set[int]) -> bytes:
    """A frame's bytes. Older engines' `local` logs drop the end of a line of several frames; all but its last are full.

    So an unended short frame after a full one gets its line's end back. What the engine does not tell apart: at the very
    end of a log it may never have had one, and after a line of exactly some full frames it stays lost.
    """
    if not part.endswith(b"\n") and len(part) >= FULL_FRAME:
        unended.add(stream)
        return part
    if stream in unended:
        unended.discard(stream)
        if not part.endswith(b"\n"):
            return part + b"\n"
    return part


def shut(response: requests.Response) -> None:
    """End a stream that another thread is reading."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        response.raw.shutdown()
