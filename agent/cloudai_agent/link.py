"""The connection to the server: made, kept, made again. What is said on it is cloudai.wire; what it means is the loop's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from typing import Protocol

from pydantic import ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from cloudai.wire import (
    PATH,
    HeartbeatAck,
    LogAck,
    Message,
    Refused,
    Register,
    Registered,
    Runs,
    encode,
    encode_log,
    from_server,
)

log = logging.getLogger("cloudai.agent")

FIRST_RETRY = 0.1  # seconds
LAST_RETRY = 5.0
REFUSED_RETRY = 15.0
ANSWER_SECONDS = 15.0  # how long the server may take to answer a registration
LAST_WORD_SECONDS = 1.0  # how long an agent that is stopped may take to say so


class Listener(Protocol):
    """Who is told of the connection."""

    def register(self) -> tuple[Register, float]:
        """What to say first, and when (by the lease's clock) it is said."""
        ...

    def registered(self, terms: Registered, sent_at: float) -> None: ...

    def told(self, runs: Runs) -> None: ...

    def acknowledged(self, beat: HeartbeatAck) -> None: ...

    def stored(self, ack: LogAck) -> None: ...

    def disconnected(self) -> None: ...


class Link:
    """`run` keeps a connection for as long as it runs; `send` is dropped silently where there is none.

    Whoever needs something to arrive says it again on the next connection, or until the server shows that it knows.
    """

    def __init__(self, server: str, token: str, listener: Listener) -> None:
        scheme, _, rest = server.rstrip("/").partition("://")
        self.url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}{PATH}"
        self._token = token
        self._listener = listener
        self._joined = False  # this try has got as far as a registration
        self._out: _Outbox | None = None
        self._connection: ClientConnection | None = None  # once a registration was sent

    def send(self, message: Message) -> None:
        if self._out is not None:
            self._out.put(encode(message))

    def send_log(self, run_id: str, offset: int, data: bytes) -> None:
        if self._out is not None:
            self._out.put_log(encode_log(run_id, offset, data))

    async def say_last(self, message: Message) -> None:
        """Send before the connection is ended, in front of all that waits."""
        if self._connection is not None:
            with contextlib.suppress(ConnectionClosed, OSError, TimeoutError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    await self._connection.send(encode(message))

    async def run(self) -> None:
        delay, said = FIRST_RETRY, ""
        while True:
            self._joined = False
            try:
                await self._connect()
            except _Refusal as refusal:
                log.error("%s", refusal)
                delay = REFUSED_RETRY
            except (OSError, InvalidHandshake, TimeoutError, ConnectionClosed, ValidationError, ValueError) as error:
                hint = "; is this the address of a CloudAI API?" if isinstance(error, InvalidHandshake) else ""
                words = f"{_words(error)}{hint}"
                level = logging.DEBUG if words == said else logging.WARNING  # a long outage is told once
                log.log(level, "no connection to %s (%s), trying again", self.url, words)
                delay, said = min(delay * 2, LAST_RETRY), words
            if self._joined:
                delay, said = FIRST_RETRY, ""
            # Many agents that lost one server must not all come back at once.
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _connect(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        # The whole wish is one message, as large as the commands of all runs together; one refused would come again for ever.
        options = {"max_size": None, "open_timeout": ANSWER_SECONDS, "close_timeout": 2, "compression": None}
        try:
            connection = await connect(self.url, additional_headers=headers, proxy=None, **options)  # type: ignore[arg-type]
        except InvalidStatus as error:
            raise _refusal(error) from None
        except InvalidURI as error:
            raise ValueError(f"--server: {error}") from None
        try:
            async with connection:
                await self._serve(connection)
        finally:
            self._connection = None
            # Ended while it waits for the other side's goodbye, the connection would stay open.
            connection.transport.abort()

    async def _serve(self, connection: ClientConnection) -> None:
        register, sent_at = self._registration()
        await connection.send(encode(register))
        self._connection = connection
        async with asyncio.timeout(ANSWER_SECONDS):
            terms = from_server.validate_json(await connection.recv())
        if isinstance(terms, Refused):
            raise _Refusal(terms.message)
        if not isinstance(terms, Registered):
            raise ValueError("the server did not answer the registration")
        self._out, self._joined = _Outbox(), True
        try:
            self._listener.registered(terms, sent_at)
            await self._talk(connection, terms.heartbeat_seconds)
        finally:
            self._out = None
            self._listener.disconnected()

    def _registration(self) -> tuple[Register, float]:
        """Raises RuntimeError where the agent itself is at fault: no other try would go better."""
        try:
            return self._listener.register()
        except ValidationError as error:
            raise RuntimeError(f"this worker cannot be registered: {error}") from error

    async def _talk(self, connection: ClientConnection, heartbeat_seconds: float) -> None:
        assert self._out is not None
        tasks = [
            asyncio.ensure_future(self._receive(connection)),
            asyncio.ensure_future(self._pass_out(connection, self._out)),
            asyncio.ensure_future(_probe(connection, heartbeat_seconds)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, connection: ClientConnection) -> None:
        async for text in connection:
            message = from_server.validate_json(text)
            match message:
                case Runs():
                    self._listener.told(message)
                case LogAck():
                    self._listener.stored(message)
                case HeartbeatAck():
                    self._listener.acknowledged(message)
                case _:
                    raise ValueError(f"the server said `{message.type}` at the wrong time")
        log.info("the server closed the connection: %s", connection.close_reason or connection.close_code)

    async def _pass_out(self, connection: ClientConnection, out: _Outbox) -> None:
        while True:
            await connection.send(await out.get())


class _Outbox:
    """What waits to be sent: messages before logs, so that no heartbeat stands in a queue behind megabytes of them."""

    def __init__(self) -> None:
        self._messages: deque[str] = deque()
        self._logs: deque[bytes] = deque()
        self._any = asyncio.Event()

    def put(self, text: str) -> None:
        self._messages.append(text)
        self._any.set()

    def put_log(self, frame: bytes) -> None:
        self._logs.append(frame)
        self._any.set()

    async def get(self) -> str | bytes:
        while True:
            if self._messages:
                return self._messages.popleft()
            if self._logs:
                return self._logs.popleft()
            self._any.clear()
            await self._any.wait()


async def _probe(connection: ClientConnection, heartbeat_seconds: float) -> None:
    """Ends a connection whose other side is silent: a network that was cut says nothing by itself."""
    while True:
        await asyncio.sleep(heartbeat_seconds)
        try:
            async with asyncio.timeout(max(heartbeat_seconds, 1.0)):
                await (await connection.ping())  # the ping itself waits where the other side reads nothing
        except TimeoutError:
            connection.transport.abort()  # so would a goodbye
            raise


class _Refusal(Exception):
    """The server does not want this agent."""


def _refusal(error: InvalidStatus) -> Exception:
    if error.response.status_code == 401:
        words = "make one with `cloudai token create` and start this agent with it; meanwhile it tries again"
        return _Refusal(f"the server does not know this join token: {words}")
    with contextlib.suppress(UnicodeDecodeError):
        return ConnectionError(f"HTTP {error.response.status_code} {bytes(error.response.body).decode()[:200]}")
    return ConnectionError(f"HTTP {error.response.status_code}")


def _words(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
