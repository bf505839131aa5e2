"""Answers in bytes: JSON, and the documented envelope for every error there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from starlette.responses import Response

from cloudai.errors import CloudAIError, Code

RawHeaders = Iterable[tuple[bytes, bytes]]


class Json(Response):
    """A JSON answer. Written for the two busiest requests: no header is computed that is known before."""

    def __init__(self, value: Any, status: int = 200, headers: RawHeaders = ()) -> None:
        self.status_code = status
        self.background = None
        self.body = orjson.dumps(value)
        self.raw_headers = [
            (b"content-length", b"%d" % len(self.body)),
            (b"content-type", b"application/json"),
            *headers,
        ]


def envelope(error: CloudAIError) -> Json:
    """The documented error body, with Retry-After where the error knows it."""
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after))
    if error.code is Code.METHOD_NOT_ALLOWED:
        headers.append((b"allow", str(error.details["allowed"]).encode()))
    body = {"error": {"code": error.code.value, "message": error.message, "details": error.details}}
    return Json(body, error.http_status, headers)
