"""What the client does about limits, outages and answers that are not CloudAI's.

The server is a socket that answers what the test wrote down, as a proxy or a server in trouble would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.transport import Transport, Unreachable

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"


def refusal(status: int, code: str, *headers: str, **details: str) -> bytes:
    body = json.dumps({"error": {"code": code, "message": "No", "details": details}})
    lines = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


class Script:
    """Answers, one a connection; `requests` are the heads that came."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers = list(answers)
        self.requests: list[str] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        writer.write(self.answers.pop(0))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[Script]:
    script = Script(answers)
    listener = await asyncio.start_server(script.answer, "127.0.0.1", 0)
    async with listener:
        script.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield script


async def test_a_limited_request_waits_as_long_as_the_server_says_and_says_so() -> None:
    notices: list[str] = []
    limited = refusal(429, "RATE_LIMITED", "Retry-After: 1")
    async with server(limited, OK) as script, Transport(script.url, notices.append) as transport:
        await transport.request("POST", "/api/tasks", body={})
    assert notices == ["The server limits requests; going on in 1 s"]
    assert len(script.requests) == 2


async def test_a_refusal_keeps_its_code_message_and_details() -> None:
    answer = refusal(400, "INVALID_REQUEST", field="req_cpu", reason="must be more")
    async with server(answer) as script, Transport(script.url) as transport:
        with pytest.raises(CloudAIError) as error:
            await transport.request("POST", "/api/tasks", body={})
    assert error.value.code is Code.INVALID_REQUEST
    assert error.value.details == {"field": "req_cpu", "reason": "must be more"}


async def test_a_read_is_repeated_when_its_answer_breaks_off() -> None:
    async with server(OK, CUT, OK) as script, Transport(script.url) as transport:
        await transport.request("GET", "/healthz")  # it has answered before, so it is expected back
        await transport.request("GET", "/api/tasks")
    assert len(script.requests) == 3


async def test_a_submit_without_a_key_is_never_repeated() -> None:
    async with server(CUT, OK) as script, Transport(script.url) as transport:
        with pytest.raises(Unreachable):
            await transport.request("POST", "/api/tasks", body={})
    assert len(script.requests) == 1


async def test_a_submit_with_a_key_is_repeated_with_the_same_key() -> None:
    async with server(OK, CUT, OK) as script, Transport(script.url) as transport:
        await transport.request("GET", "/healthz")
        await transport.request("POST", "/api/tasks", body={}, headers={"Idempotency-Key": "k"})
    assert [("idempotency-key: k" in head.lower()) for head in script.requests] == [False, True, True]


async def test_a_server_that_is_not_ready_is_asked_again() -> None:
    notices: list[str] = []
    answers = refusal(503, "UNAVAILABLE", "Retry-After: 1", reason="database is locked"), OK
    async with server(*answers) as script, Transport(script.url, notices.append) as transport:
        await transport.request("GET", "/api/tasks")
    assert "database is locked" in notices[0]


async def test_a_server_that_never_answered_is_given_up_at_once() -> None:
    async with server() as script:
        url = script.url
    async with Transport(url) as transport:
        with pytest.raises(Unreachable) as error:
            await transport.request("GET", "/api/tasks")
    assert url in error.value.message


async def test_an_answer_of_something_else_is_told_by_its_status() -> None:
    page = b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n<html>"
    async with server(page) as script, Transport(script.url) as transport:
        with pytest.raises(CloudAIError, match="answered 404"):
            await transport.request("GET", "/api/tasks")
