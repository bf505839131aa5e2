"""What the client does about limits, outages and answers that are not CloudAI's.

The server is a socket that answers what the test wrote down, as a proxy or a server in trouble would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from cloudai.api.openapi import document
from cloudai.cli.place import listen
from cloudai.client import Client
from cloudai.errors import CloudAIError, Code
from cloudai.settings import Settings
from cloudai.transport import ANSWER_SECONDS, Transport, Unreachable

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


async def test_a_log_that_breaks_off_is_taken_up_and_where_nothing_of_it_comes_that_is_told_and_waited_for() -> None:
    notices: list[str] = []
    head = b"HTTP/1.1 200 OK\r\nX-Log-End: 2\r\nContent-Length: 2\r\n\r\n"
    async with server(head + b"a", head, head, head + b"bc") as script, Client(script.url, notices.append) as client:
        assert b"".join([data async for data in client.log("task-1", 1)]) == b"abc"
    assert notices == [f"The log from {script.url} breaks off; trying again"] * 2
    assert ["offset=1" in head for head in script.requests] == [False, True, True, True]


async def test_a_server_that_is_not_ready_is_asked_again() -> None:
    notices: list[str] = []
    answers = refusal(503, "UNAVAILABLE", "Retry-After: 1", reason="database is locked"), OK
    async with server(*answers) as script, Transport(script.url, notices.append) as transport:
        await transport.request("GET", "/api/tasks")
    assert "database is locked" in notices[0]


def test_the_client_is_more_patient_than_the_longest_wait_it_may_ask_for() -> None:
    parameters = document()["paths"]["/api/tasks/{task_id}"]["get"]["parameters"]
    [longest] = [one["schema"]["maximum"] for one in parameters if one["name"] == "wait_seconds"]
    assert longest + 10 < ANSWER_SECONDS


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


async def test_both_ends_of_a_log_on_which_nothing_is_said_notice_that_the_other_one_is_gone() -> None:
    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()
        over.set()

    over = asyncio.Event()
    listener = await asyncio.start_server(quiet, sock=listen(Settings(host="127.0.0.1", port=0)))
    port = listener.sockets[0].getsockname()[1]
    async with listener, asyncio.timeout(30):
        async with Transport(f"http://127.0.0.1:{port}") as transport, transport.stream("/", {}):
            while await asyncio.to_thread(timers, port) != ["02", "02"]:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.01)
        await over.wait()


def timers(port: int) -> list[str]:
    """Of each open connection to a port, by either of its ends, the timer that runs: 02 is that of keepalive."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    end = f":{port:04X}"
    return [timer[:2] for _, one, other, state, _, timer, *_ in lines if state == "01" and end in one[-5:] + other[-5:]]
