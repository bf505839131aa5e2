"""The agent's connection, by itself."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest
from websockets.asyncio.server import ServerConnection, serve

from cloudai.wire import HeartbeatAck, LogAck, Register, Registered, Runs, encode
from cloudai_agent.lease import clock
from cloudai_agent.link import Link
from tests.agent.joined import MIB, PATIENCE, TOKEN, joined
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


async def test_a_server_that_reads_nothing_any_more_is_left_though_logs_are_on_their_way() -> None:
    async def hang(connection: ServerConnection) -> None:
        await connection.recv()
        terms = Registered(cluster_id="c", heartbeat_seconds=0.2, lease_seconds=60, stop_grace_seconds=1)
        await connection.send(encode(terms))
        connection.transport.pause_reading()  # its kernel still says that all is well
        await connection.wait_closed()

    async with asyncio.timeout(PATIENCE), serve(hang, "127.0.0.1", 0, ping_interval=None, close_timeout=0.1) as server:
        listening = Listening()
        port = server.sockets[0].getsockname()[1]
        link = Link(f"http://127.0.0.1:{port}", TOKEN, listening)
        running = asyncio.ensure_future(link.run())
        await listening.joined.wait()
        for offset in range(0, 32 * MIB, MIB // 8):  # more than all buffers on the way hold
            link.send_log("task-1-1", offset, b"x" * (MIB // 8))
        await listening.over.wait()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


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
