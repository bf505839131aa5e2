"""The agent's connection, by itself."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from cloudai.wire import HeartbeatAck, LogAck, Register, Registered, Runs
from cloudai_agent.lease import clock
from cloudai_agent.link import Link
from tests.agent.joined import PATIENCE, TOKEN, joined
from tests.engines.proxy import Proxy


class Listening:
    """Joins, and tells when the connection is there and when it is over."""

    def __init__(self) -> None:
        self.joined = asyncio.Event()
        self.over = asyncio.Event()

    def register(self) -> tuple[Register, float]:
        amounts = {"cpu": 1000, "memory": 1, "storage": 0, "gpu": 0}
        return Register(worker_id="w", identity="identity", address="", runtime="process", **amounts), clock()

    def registered(self, terms: Registered, sent_at: float) -> None:
        self.joined.set()

    def told(self, runs: Runs) -> None: ...

    def acknowledged(self, beat: HeartbeatAck) -> None: ...

    def stored(self, ack: LogAck) -> None: ...

    def disconnected(self) -> None:
        self.over.set()


class Impossible(Listening):
    """Has nothing to offer, which no server takes."""

    def register(self) -> tuple[Register, float]:
        told, at = super().register()
        return Register.model_validate(told.model_dump() | {"cpu": 0}), at


async def test_a_worker_that_cannot_be_registered_says_so_instead_of_trying_for_ever(tmp_path: Path) -> None:
    async with asyncio.timeout(PATIENCE), joined(tmp_path) as place:
        with pytest.raises(RuntimeError, match="this worker cannot be registered"):
            await Link(f"http://127.0.0.1:{place.port}", TOKEN, Impossible()).run()


async def test_a_link_that_is_ended_while_it_says_goodbye_leaves_no_socket_open(tmp_path: Path) -> None:
    async with asyncio.timeout(PATIENCE), joined(tmp_path) as place:
        with Proxy(place.port) as network:
            listening = Listening()
            running = asyncio.ensure_future(Link(f"http://127.0.0.1:{network.port}", TOKEN, listening).run())
            await listening.joined.wait()
            network.cut()
            await listening.over.wait()  # nobody answers the goodbye either
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            open_still = [
                one.raddr.port for one in psutil.Process().net_connections("tcp") if one.raddr and one.fd != -1
            ]
            assert network.port not in open_still
