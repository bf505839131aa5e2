"""The agents' endpoint, over both databases: who is let in, and what becomes of who says what it must not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from cloudai.api import agents
from cloudai.errors import unavailable
from cloudai.resources import RunPhase
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore, open_store
from cloudai.wire import PATH, PROTOCOL, encode_log
from tests.api.conftest import PATIENCE, Document, serving
from tests.engines.postgres import Postgres
from tests.store.values import SPEC, WORKER, placed, placing
from tests.store.worlds import new_name

TOKEN = "token"
POLICY_VIOLATION = 1008
COME_AGAIN = 1012
LATER = 1013
REGISTER: Document = {
    "type": "register",
    "protocol": PROTOCOL,
    "worker_id": "worker-1",
    "identity": "identity-1",
    "address": "127.0.0.1:50052",
    "runtime": "process",
    "cpu": 4000,
    "memory": 1 << 33,
    "storage": 0,
    "gpu": 0,
}


@dataclass(frozen=True)
class Agent:
    """One connection, which says whatever a test says."""

    socket: ClientConnection

    async def say(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def heard(self) -> Document:
        async with asyncio.timeout(PATIENCE):
            return dict(json.loads(await self.socket.recv()))

    async def closed(self) -> tuple[int, str]:
        """The code and the words that the server closed with; what it said before is passed over."""
        with contextlib.suppress(websockets.ConnectionClosedError):
            async with asyncio.timeout(PATIENCE):
                async for _ in self.socket:
                    pass
        return self.socket.close_code or 0, self.socket.close_reason or ""


@dataclass(frozen=True)
class Endpoint:
    """A facade that agents with TOKEN may join."""

    store: SqlStore
    port: int

    @contextlib.asynccontextmanager
    async def connected(self, authorization: str | None = f"Bearer {TOKEN}") -> AsyncIterator[Agent]:
        headers = {} if authorization is None else {"Authorization": authorization}
        url = f"ws://127.0.0.1:{self.port}{PATH}"
        async with websockets.connect(url, additional_headers=headers, proxy=None) as socket:
            yield Agent(socket)

    @contextlib.asynccontextmanager
    async def joined(self, **fields: Any) -> AsyncIterator[Agent]:
        async with self.connected() as agent:
            await agent.say(**REGISTER | fields)
            assert [(await agent.heard())["type"] for _ in range(2)] == ["registered", "runs"]
            yield agent

    async def refused(self, **fields: Any) -> Document:
        """The refusal of a registration."""
        async with self.connected() as agent:
            await agent.say(**REGISTER | fields)
            refusal = await agent.heard()
            assert refusal["type"] == "refused"
            assert await agent.closed() == (POLICY_VIOLATION, refusal["code"])
            return refusal

    async def sent_away(self, *messages: str | bytes, joined: bool = False) -> None:
        """Who says this is not understood."""
        async with self.joined() if joined else self.connected() as agent:
            for message in messages:
                await agent.socket.send(message)
            assert await agent.closed() == (POLICY_VIOLATION, "not understood"), messages


@pytest.fixture(params=["sqlite", "postgres"])
async def endpoint(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Endpoint]:
    url = settings.url
    if request.param == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.create(new_name())
    store = await open_store(url)
    await store.add_token(hashlib.sha256(TOKEN.encode()).digest(), "test")
    async with serving(store, settings) as facade:
        yield Endpoint(store, facade.port)
    await store.close()


async def handshake_refused(endpoint: Endpoint, authorization: str | None) -> tuple[int, Document]:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with endpoint.connected(authorization):
            pass
    error = json.loads(refused.value.response.body or b"")["error"]
    assert set(error) == {"code", "message", "details"}
    return refused.value.response.status_code, error


async def test_without_a_known_token_nobody_is_let_in(endpoint: Endpoint) -> None:
    for authorization in (None, "", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN):
        status, error = await handshake_refused(endpoint, authorization)
        assert (status, error["code"]) == (401, "UNAUTHORIZED"), authorization
        assert "cloudai token create" in error["message"]


@pytest.mark.parametrize(
    "fault", [unavailable("the disk is full"), RuntimeError("secret words")], ids=["away", "fault"]
)
async def test_a_store_that_fails_at_the_handshake_is_an_error_of_the_documented_form(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    async def failing(_: bytes) -> bool:
        raise fault

    monkeypatch.setattr(endpoint.store, "has_token", failing)
    status, error = await handshake_refused(endpoint, f"Bearer {TOKEN}")
    known = {503: "UNAVAILABLE", 500: "INTERNAL"}
    assert error["code"] == known[status]
    assert "secret" not in str(error)


@pytest.mark.parametrize(("lease", "known"), [(300.0, 310_000), (float("inf"), 0)])
async def test_what_an_agent_is_told_of_lease_and_grace_is_known_of_its_worker(
    settings: Settings, lease: float, known: int
) -> None:
    store = await open_store(settings.url)
    await store.add_token(hashlib.sha256(TOKEN.encode()).digest(), "test")
    told = settings.model_copy(update={"lease_seconds": lease, "stop_grace_seconds": 10.0})
    async with serving(store, told) as facade, Endpoint(store, facade.port).joined():
        assert (await store.get_workers())["worker-1"].lease == known
    await store.close()


async def test_a_name_is_its_first_machine_s_while_the_lease_holds(endpoint: Endpoint) -> None:
    async with endpoint.joined():
        refusal = await endpoint.refused(identity="identity-2")
    assert refusal["code"] == "name_taken"
    assert "--worker-id" in refusal["message"]
    await endpoint.refused(identity="identity-2")  # though the first one is not connected any more
    assert (await endpoint.store.get_workers())["worker-1"].identity == "identity-1"


async def test_a_name_whose_lease_is_over_goes_to_another_machine_once_it_holds_nothing(endpoint: Endpoint) -> None:
    await endpoint.store.register_worker(WORKER)  # heard of last in 1970
    _, run = await placed(endpoint.store)
    assert (await endpoint.refused(identity="identity-2"))["code"] == "name_taken"
    await endpoint.store.commit([[replace(run, phase=RunPhase.LOST)]])
    async with endpoint.joined(identity="identity-2"):
        assert (await endpoint.store.get_workers())["worker-1"].identity == "identity-2"


async def test_of_machines_that_come_at_once_with_one_name_one_is_let_in(endpoint: Endpoint) -> None:
    async def come(number: int) -> Document:
        async with endpoint.connected() as agent:
            await agent.say(**REGISTER | {"identity": f"identity-{number}"})
            answer = await agent.heard()
            await everybody.wait()
            return answer

    everybody = asyncio.Barrier(8)
    answers = await asyncio.gather(*(come(number) for number in range(8)))
    assert sorted(answer["type"] for answer in answers) == ["refused"] * 7 + ["registered"]
    assert {answer["code"] for answer in answers if answer["type"] == "refused"} == {"name_taken"}


async def test_another_version_of_the_protocol_is_refused_in_words(endpoint: Endpoint) -> None:
    for news in ({}, {"a_field_of_the_next_version": True}):
        refusal = await endpoint.refused(protocol=PROTOCOL + 1, **news)
        assert refusal["code"] == "protocol"
        assert "run the same CloudAI on both" in refusal["message"]
    assert await endpoint.store.get_workers() == {}


def wrong(**fields: Any) -> str:
    return json.dumps(REGISTER | fields)


NO_REGISTRATION: list[str | bytes] = [
    "",
    "junk",
    "[]",
    "null",
    b"junk",
    '{"type": "heartbeat", "sent_at": 1}',
    '{"type": "register"}',
    wrong(unknown=1),
    wrong(worker_id="../x"),
    wrong(cpu=0),
    wrong(memory=2**70),
    wrong(gpu=500),
    wrong(gpu=65_000),
    wrong(gpu=2**53 // 1000 * 1000),
    wrong(ready=False, problem="x" * 1001),
]


async def test_who_begins_with_anything_but_a_registration_is_sent_away(endpoint: Endpoint) -> None:
    for first in NO_REGISTRATION:
        await endpoint.sent_away(first)
    assert await endpoint.store.get_workers() == {}


async def test_who_says_nothing_is_sent_away(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "FIRST_MESSAGE_SECONDS", 0.01)
    await endpoint.sent_away()


REPORT: Document = {"type": "report", "task_id": "task-1", "attempt": 1, "phase": "running"}


NOT_UNDERSTOOD: list[str | bytes] = [
    json.dumps(REGISTER),
    "junk",
    b"no header",
    b"{}\nno run",
    '{"type": "heartbeat"}',
    '{"type": "heartbeat", "sent_at": 1, "cpu_usage": 101}',
    '{"type": "heartbeat", "sent_at": NaN}',
    json.dumps(REPORT | {"phase": "resting"}),
    json.dumps(REPORT | {"attempt": 2**31}),
    json.dumps(REPORT | {"started_at": 2**63}),
    json.dumps(REPORT | {"exit_code": 2**63}),
]


async def test_who_has_joined_and_then_says_what_nobody_understands_is_sent_away(endpoint: Endpoint) -> None:
    for message in NOT_UNDERSTOOD:
        await endpoint.sent_away(message, joined=True)


async def others_run(endpoint: Endpoint) -> str:
    """The id of a run of worker-2."""
    await endpoint.store.commit([placing(await endpoint.store.create_task(SPEC), "worker-2")])
    (run_id,) = (await endpoint.store.snapshot()).runs
    return run_id


async def said_to_be_gone(agent: Agent) -> Iterable[str]:
    message = await agent.heard()
    assert message["type"] == "runs"
    assert not message["runs"]
    return list(message["gone"])


async def test_nobody_reports_on_another_s_run(endpoint: Endpoint) -> None:
    run_id = await others_run(endpoint)
    before = await endpoint.store.get_runs([run_id])
    async with endpoint.joined() as agent:
        await agent.say(**REPORT | {"task_id": run_id.removesuffix("-1"), "phase": "failed", "exit_code": 1})
        assert await said_to_be_gone(agent) == [run_id]
    assert await endpoint.store.get_runs([run_id]) == before


async def test_a_report_on_a_run_that_is_not_there_is_answered(endpoint: Endpoint) -> None:
    async with endpoint.joined() as agent:
        for task_id in ("task-1", "nonsense", "task-0"):
            await agent.say(**REPORT | {"task_id": task_id})
            assert await said_to_be_gone(agent) == [f"{task_id}-1"]


async def test_nobody_writes_the_log_of_another_s_run(endpoint: Endpoint) -> None:
    run_id = await others_run(endpoint)
    async with endpoint.joined() as agent:
        await agent.socket.send(encode_log(run_id, 0, b"not mine"))
        assert await said_to_be_gone(agent) == [run_id]
    assert await endpoint.store.log_ends([run_id]) == {run_id: 0}


async def test_an_engine_s_words_are_kept_whatever_characters_they_have(endpoint: Endpoint) -> None:
    _, run = await placed(endpoint.store)
    async with endpoint.joined(problem="it said \0") as agent:
        await agent.say(
            **REPORT | {"task_id": run.task_id, "phase": "failed", "message": "it said \0 and \ud83d\ude00"}
        )
        answer = await agent.heard()
        assert answer["gone"] == [run.run_id]
    assert (await endpoint.store.get_runs([run.run_id]))[run.run_id].message == "it said \ufffd and \U0001f600"
    assert (await endpoint.store.get_workers())["worker-1"].problem == "it said \ufffd"


async def test_a_newer_connection_of_a_worker_takes_the_place_of_the_older_one(endpoint: Endpoint) -> None:
    async with endpoint.joined() as older, endpoint.joined() as newer:
        assert await older.closed() == (COME_AGAIN, "a newer connection of this worker")
        _, run = await placed(endpoint.store)
        told = await newer.heard()
        assert [each["task_id"] for each in told["runs"]] == [run.task_id]
        await newer.say(**REPORT | {"task_id": run.task_id, "phase": "starting"})
        assert [each["phase"] for each in (await newer.heard())["runs"]] == ["starting"]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "WHOLE_SECONDS", 0.1)


@pytest.mark.usefixtures("often")  # from the start of the facade
async def test_who_joined_with_a_token_that_is_revoked_is_cut_off(endpoint: Endpoint) -> None:
    async with endpoint.joined() as agent:
        another = hashlib.sha256(b"another").digest()
        await endpoint.store.add_token(another, "another")
        assert await endpoint.store.remove_token(another)
        for _ in range(2):  # one of them was begun after that
            assert (await agent.heard())["type"] == "runs"
        assert await endpoint.store.remove_token(hashlib.sha256(TOKEN.encode()).digest())
        assert await agent.closed() == (COME_AGAIN, "its join token was revoked")
    assert (await handshake_refused(endpoint, f"Bearer {TOKEN}"))[0] == 401
    async with asyncio.timeout(PATIENCE):
        async for _ in endpoint.store.watch(0):
            worker = (await endpoint.store.get_workers())["worker-1"]
            if not worker.ready:
                break
    assert worker.problem == "its join token was revoked"


async def test_a_heartbeat_is_acknowledged_once_it_is_stored(endpoint: Endpoint) -> None:
    began = time.time_ns() // 1_000_000
    async with endpoint.joined() as agent:
        await agent.say(type="heartbeat", sent_at=12.5, cpu_usage=50.0)
        assert await agent.heard() == {"type": "heartbeat_ack", "sent_at": 12.5}
        worker = (await endpoint.store.get_workers())["worker-1"]
        assert (worker.cpu_usage, worker.last_heartbeat >= began) == (50.0, True)


@pytest.mark.parametrize("forgotten", [False, True])
async def test_whose_heartbeat_is_not_stored_has_to_register_again(endpoint: Endpoint, forgotten: bool) -> None:
    async with endpoint.joined() as agent:
        if forgotten:
            assert await endpoint.store.delete_workers(before=1 << 50) == 1
        else:
            await endpoint.store.register_worker(replace(WORKER, identity="identity-2"), replaces="identity-1")
        await agent.say(type="heartbeat", sent_at=1)
        with pytest.raises(websockets.ConnectionClosed):
            await agent.heard()  # no acknowledgement
        assert await agent.closed() == (COME_AGAIN, "its name is another machine's now, or was forgotten")
    if forgotten:
        async with endpoint.joined() as agent:
            await agent.say(type="heartbeat", sent_at=2)
            assert await agent.heard() == {"type": "heartbeat_ack", "sent_at": 2}


async def test_a_store_that_does_not_answer_sends_agents_away_for_now(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(_: object) -> None:
        raise unavailable("the disk is full")

    async with endpoint.joined() as agent:
        monkeypatch.setattr(endpoint.store, "report_run", failing)
        await agent.say(**REPORT)
        assert await agent.closed() == (LATER, "the store does not answer")


async def test_a_fault_of_the_hub_is_told_and_ends_nothing(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agents, "RETRY_SECONDS", 0)
    async with endpoint.joined() as agent:
        failed = [fail_once(monkeypatch, endpoint.store, name) for name in ("get_runs", "record_heartbeats")]
        _, run = await placed(endpoint.store)
        assert [each["task_id"] for each in (await agent.heard())["runs"]] == [run.task_id]
        await agent.say(type="heartbeat", sent_at=1)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(each.wait() for each in failed))
        await agent.say(type="heartbeat", sent_at=2)
        assert await agent.heard() == {"type": "heartbeat_ack", "sent_at": 2}
    assert "a fault of get_runs" in caplog.text
    assert "a fault of record_heartbeats" in caplog.text


def fail_once(monkeypatch: pytest.MonkeyPatch, store: SqlStore, name: str) -> asyncio.Event:
    """Set when it has failed."""
    failed, method = asyncio.Event(), getattr(store, name)

    async def failing(*arguments: Any) -> Any:
        if failed.is_set():
            return await method(*arguments)
        failed.set()
        raise RuntimeError(f"a fault of {name}")

    monkeypatch.setattr(store, name, failing)
    return failed
