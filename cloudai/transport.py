"""Requests of the documented API, as often as it takes: what a client must do about limits, restarts and lost answers.

A request that may be sent twice (reading, cancelling, a submit with an Idempotency-Key) is sent again after a broken
connection or a 503; one that was limited waits as long as the server says. Who waits is told why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.request import getproxies

import httpx

from cloudai.errors import CloudAIError, Code
from cloudai.keepalive import KEEPALIVE

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 75.0  # longer than any answer the server holds back on purpose: 60 s, and what it takes to answer then
RETURN_SECONDS = 60.0  # how long a server that has answered before may be away
BUSY_SECONDS = 10.0  # how long a server may answer 503


class Unreachable(CloudAIError):
    """No answer from the server; `url` is where it was looked for."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(Code.UNAVAILABLE, f"No CloudAI answers at {url} ({reason})", {"reason": reason})
        self.url = url


class Transport:
    """One server's API. Use as an asynchronous context manager.

    `notice` is called with a sentence when a request has to wait.
    """

    def __init__(self, server: str, notice: Callable[[str], None] = lambda _: None) -> None:
        self.server = server.rstrip("/")
        self._notice = notice
        self._answered = False
        url = httpx.URL(self.server)
        verify = url.scheme == "https"  # the certificates take long to load
        elsewhere = url.host not in ("127.0.0.1", "localhost", "::1")  # no proxy between this machine and itself
        proxied = elsewhere and bool(getproxies())
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            verify=verify,
            trust_env=elsewhere,
            # Who follows a quiet log waits without end. httpx takes these with a transport only, and then knows no proxy.
            transport=None if proxied else httpx.AsyncHTTPTransport(verify=verify, socket_options=list(KEEPALIVE)),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """A successful answer, read to its end. Raises Unreachable, or the CloudAIError that the server answered."""
        return await self._send(self._http.build_request(method, path, params=query, json=body, headers=headers))

    @asynccontextmanager
    async def stream(self, path: str, query: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """A successful answer to a GET whose body is still to be read, however long it takes to come.

        What breaks while it is read reaches the reader as httpx.TransportError.
        """
        request = self._http.build_request(
            "GET", path, params=query, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
        answer = await self._send(request, stream=True)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        troubled: float | None = None
        while True:
            try:
                answer = await self._http.send(request, stream=stream)
                if answer.is_success:
                    self._answered = True
                    return answer
                error = await _error_of(answer)
            except httpx.TransportError as broken:
                error = Unreachable(self.server, _reason(broken))
                if not self._may_repeat(request, broken):
                    raise error from None
            troubled = troubled or time.monotonic()
            await self._wait_or_raise(error, request, time.monotonic() - troubled)
            if error.code is Code.RATE_LIMITED:
                troubled = None

    def _may_repeat(self, request: httpx.Request, broken: httpx.TransportError) -> bool:
        """Whether the request may be sent again though it may have been carried out."""
        never_sent = isinstance(broken, httpx.ConnectError | httpx.ConnectTimeout)
        return self._answered if never_sent else _harmless_twice(request)

    async def _wait_or_raise(self, error: CloudAIError, request: httpx.Request, troubled: float) -> None:
        pause = error.retry_after or 1
        if error.code is Code.RATE_LIMITED:
            self._notice(f"The server limits requests; going on in {pause} s")
        elif isinstance(error, Unreachable) and troubled < (RETURN_SECONDS if self._answered else 0):
            self._notice(f"No answer from {self.server}; trying again")
        elif error.code is Code.UNAVAILABLE and _harmless_twice(request) and troubled < BUSY_SECONDS:
            self._notice(f"The server is not ready ({error.details.get('reason', error.message)}); trying again")
        else:
            raise error
        await asyncio.sleep(pause)


def _harmless_twice(request: httpx.Request) -> bool:
    return request.method == "GET" or "Idempotency-Key" in request.headers or request.url.path.endswith("/cancel")


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error).strip() or type(error).__name__


def not_cloudai(server: str) -> CloudAIError:
    """For an answer that only another program, such as a portal on the way, can have given."""
    return CloudAIError(Code.INTERNAL, f"What answers at {server} is no CloudAI API; check --server")


async def _error_of(answer: httpx.Response) -> CloudAIError:
    """What a refusal says; one that is not ours (a proxy's) is told by its status."""
    await answer.aread()
    wait = answer.headers.get("Retry-After", "")
    retry_after = int(wait) if wait.isdecimal() else None
    try:
        body = answer.json()["error"]
        return CloudAIError(Code(body["code"]), body["message"], body.get("details"), retry_after=retry_after)
    except (ValueError, KeyError, TypeError):
        code = {429: Code.RATE_LIMITED, 502: Code.UNAVAILABLE, 503: Code.UNAVAILABLE}.get(
            answer.status_code, Code.INTERNAL
        )
        message = f"{answer.url.copy_with(query=None)} answered {answer.status_code} without saying why"
        return CloudAIError(code, message, retry_after=retry_after)
