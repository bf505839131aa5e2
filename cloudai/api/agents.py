"""The agents' own endpoint: one WebSocket a worker (cloudai.wire says what is said on it).

The hub only passes on: what a worker says goes to the store, and what the store then holds of its runs goes to the worker.
It decides nothing, so it may be killed and started at any instant, and there may be several.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from cloudai.api.agent_session import Beat, Session
from cloudai.api.answers import envelope
from cloudai.api.clients import Clients
from cloudai.clock import now_ms
from cloudai.errors import CloudAIError, Code
from cloudai.resources import Run, Worker
from cloudai.settings import Settings
from cloudai.store.protocol import Heartbeat, Kind, NameTaken, Pruned, Store
from cloudai.wire import (
    PROTOCOL,
    Greeting,
    HeartbeatAck,
    HeartbeatMessage,
    Refused,
    Register,
    Registered,
    from_agent,
)

log = logging.getLogger("cloudai.agents")

FIRST_MESSAGE_SECONDS = 10.0
RETRY_SECONDS = 1.0
WHOLE_SECONDS = 30.0  # how often every worker is told its whole wish
POLICY_VIOLATION = 1008
TRY_AGAIN = 1013
REVOKED = "its join token was revoked"
UNKNOWN = "its name is another machine's now, or was forgotten"


class AgentHub:
    """`connect` serves one agent; `run` goes on as long as the facade does."""

    def __init__(self, store: Store, settings: Settings, clients: Clients) -> None:
        self._store = store
        self._settings = settings
        self._clients = clients
        self._flush_seconds = min(1.0, settings.heartbeat_seconds / 2)
        self._sessions: dict[str, Session] = {}
        self._beats: list[Beat] = []
        self._promised = _promised(settings)

    async def run(self) -> None:
        try:
            await asyncio.gather(self._follow(), self._flush_beats(), self._repeat())
        finally:
            await self._store_beats()  # among them may be the last word of a worker that was stopped

    # -- one agent

    async def connect(self, websocket: WebSocket) -> None:
        """Serve an agent until it goes. A bad token or an unreachable store is an HTTP error of the handshake."""
        try:
            token = await self._checked_token(websocket)
        except CloudAIError as error:
            log.warning("an agent at %s is refused: %s", self._clients.address(websocket.scope), error.message)
            await websocket.send_denial_response(envelope(error))
            return
        await websocket.accept()
        try:
            session = await self._register(websocket, token)
            if session is not None:
                await self._serve(session)
        except WebSocketDisconnect:
            pass
        except (ValidationError, ValueError, KeyError) as error:
            log.warning("an agent sent what it must not: %s", str(error).partition("\n")[0])
            await _close(websocket, POLICY_VIOLATION, "not understood")
        except CloudAIError as error:
            # The agent connects again and says what it still has to say.
            log.warning("an agent is sent away for now: %s", error)
            await _close(websocket, TRY_AGAIN, "the store does not answer")

    async def _checked_token(self, websocket: WebSocket) -> bytes:
        scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.encode()).digest()
        if scheme.lower() != "bearer" or not await self._store.has_token(digest):
            raise CloudAIError(
                Code.UNAUTHORIZED,
                "This join token is not known; make one with `cloudai token create` where the API runs",
            )
        return digest

    async def _register(self, websocket: WebSocket, token: bytes) -> Session | None:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
                text = await websocket.receive_text()
        except TimeoutError:
            raise ValueError(f"nothing came within {FIRST_MESSAGE_SECONDS:g} seconds") from None
        refusal = _other_protocol(text)
        if refusal is None:
            message = from_agent.validate_json(text)
            if not isinstance(message, Register):
                raise ValueError("the first message must be `register`")
            refusal = await self._entered(message)
            if refusal is None:
                return Session(websocket, token, message.worker_id, message.identity)
        log.warning("an agent is refused: %s", refusal.message)
        await websocket.send_text(refusal.model_dump_json())
        await _close(websocket, POLICY_VIOLATION, refusal.code)
        return None

    async def _entered(self, message: Register) -> Refused | None:
        """Store the worker, unless its name is another machine's that may still hold something."""
        known = (await self._store.get_workers([message.worker_id])).get(message.worker_id)
        if known is not None and known.identity != message.identity:
            over = now_ms() - known.last_heartbeat > max(self._settings.lease_seconds * 1000, known.lease)
            # What the first one held is not for another to speak of: the controller gives it up first.
            if not over or await self._store.runs_of_worker(message.worker_id):
                return _name_taken(message.worker_id)
        try:
            await self._store.register_worker(_worker(message, self._promised), known.identity if known else None)
        except NameTaken:  # by one that came at the same time
            return _name_taken(message.worker_id)
        return None

    async def _serve(self, session: Session) -> None:
        before = self._sessions.get(session.worker_id)
        # Known before the wish is read: what changes meanwhile is told afterwards.
        self._sessions[session.worker_id] = session
        if before is not None:
            before.end("a newer connection of this worker")
        log.info("worker %s has joined", session.worker_id, extra={"worker_id": session.worker_id})
        try:
            session.send(self._terms())
            await self._tell_all(session)
            await session.serve(self._store, self._beats)
        finally:
            if self._sessions.get(session.worker_id) is session:
                del self._sessions[session.worker_id]
            log.info("worker %s has gone", session.worker_id, extra={"worker_id": session.worker_id})

    def _terms(self) -> Registered:
        lease = self._settings.lease_seconds
        return Registered(
            cluster_id=self._store.cluster_id,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            lease_seconds=None if lease == math.inf else lease,
            stop_grace_seconds=self._settings.stop_grace_seconds,
        )

    # -- the wish

    async def _tell_all(self, session: Session) -> None:
        """Send a worker its whole wish, with the logs' ends the first time: that is where it begins to send them."""
        first = session.begin_whole()
        runs = await self._store.runs_of_worker(session.worker_id)
        ends = await self._store.log_ends([run.run_id for run in runs]) if first else {}
        late = session.send_whole(runs, ends)
        session.send_changed((await self._store.get_runs(late)).values())

    async def _repeat(self) -> None:
        """Tell everybody the whole now and then: repairs what was missed, whatever missed it."""
        while True:
            await asyncio.sleep(WHOLE_SECONDS)
            await self._end_revoked()
            for session in [each for each in self._sessions.values() if each.whole]:
                try:
                    await self._tell_all(session)
                except CloudAIError:
                    session.end("the store does not answer")
                except Exception:
                    log.exception("worker %s cannot be told what it is to run", session.worker_id)
                    session.end("a fault in the server")

    async def _end_revoked(self) -> None:
        """Who joined with a token that is no longer there goes."""
        sessions = list(self._sessions.values())  # who comes later was let in by a token that is there
        try:
            known = {token.digest for token in await self._store.list_tokens()} if sessions else set()
        except CloudAIError:
            return  # the store does not answer: the next time
        except Exception:
            log.exception("the join tokens cannot be read")
            return
        for session in sessions:
            if session.token not in known:
                session.end(REVOKED)
                last = HeartbeatMessage(sent_at=0, ready=False, problem=REVOKED)
                self._beats.append(Beat(session, last, session.heard_at))  # nothing more is placed there

    def _tell(self, runs: Iterable[Run]) -> None:
        """Send changed runs to the workers that have them."""
        mine: defaultdict[str, list[Run]] = defaultdict(list)
        for run in runs:
            mine[run.worker_id].append(run)
        for worker_id, changed in mine.items():
            if worker_id in self._sessions:
                self._sessions[worker_id].send_changed(changed)

    async def _follow(self) -> None:
        """Pass on every change of a run, for ever."""
        revision: int | None = None
        while True:
            try:
                async for batch in self._store.watch(revision):
                    keys = list(dict.fromkeys(change.key for change in batch if change.kind is Kind.RUN))
                    if keys and self._sessions:
                        self._tell((await self._store.get_runs(keys)).values())
                    revision = batch[-1].revision
            except Pruned:
                # Everybody comes back and is told the whole; what falls between is told by `_repeat`.
                revision = None
                for session in list(self._sessions.values()):
                    session.end("changes were missed")
            except CloudAIError as error:
                log.warning("cannot follow the store, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("a fault while following the store, trying again")
                await asyncio.sleep(RETRY_SECONDS)

    # -- heartbeats

    async def _flush_beats(self) -> None:
        while True:
            await asyncio.sleep(self._flush_seconds)
            await self._store_beats()

    async def _store_beats(self) -> None:
        """Store the heartbeats that came, all in one transaction, and acknowledge them once they are durable.

        Of a worker that is not known none is stored: its agent has to register again, and hears then whether it may.
        """
        beats, self._beats[:] = list(self._beats), []
        if not beats:
            return
        try:
            known = await self._store.record_heartbeats([_stored(beat, self._promised) for beat in beats])
        except CloudAIError as error:
            # Not acknowledged: the agents' leases run on, and their next heartbeats try again.
            log.warning("heartbeats were not stored: %s", error)
            return
        except Exception:
            log.exception("heartbeats were not stored")
            return
        for beat in beats:
            if (beat.session.worker_id, beat.session.identity) in known:
                beat.session.send(HeartbeatAck(sent_at=beat.message.sent_at))
            else:  # an acknowledgement would be a lease that nobody keeps
                beat.session.end(UNKNOWN)


def _other_protocol(text: str) -> Refused | None:
    """A refusal in words for an agent of another protocol, whatever else its `register` has in it."""
    try:
        protocol = Greeting.model_validate_json(text).protocol
    except ValidationError:
        return None  # it is no `register`, which is told elsewhere
    if protocol == PROTOCOL:
        return None
    text = f"this server speaks version {PROTOCOL} of the agents' protocol, the agent {protocol}"
    return Refused(code="protocol", message=f"{text}: run the same CloudAI on both")


def _name_taken(worker_id: str) -> Refused:
    text = f"another machine is worker {worker_id} and its lease holds: give this one another --worker-id"
    return Refused(code="name_taken", message=f"{text}, or wait until the lease has ended")


def _worker(message: Register, lease: int) -> Worker:
    now = now_ms()
    return Worker(
        worker_id=message.worker_id,
        identity=message.identity,
        address=message.address,
        capacity=message.capacity,
        runtime=message.runtime,
        registered_at=now,
        last_heartbeat=now,
        ready=message.ready,
        problem=message.problem,
        lease=lease,
    )


def _promised(settings: Settings) -> int:
    """What a worker keeps of what its agent is told (ms)."""
    promised = settings.lease_seconds + settings.stop_grace_seconds
    return 0 if promised == math.inf else round(promised * 1000)


def _stored(beat: Beat, lease: int) -> Heartbeat:
    """`lease`: what agents that join here are told. Who says its last word may not have heard it."""
    message = beat.message
    return Heartbeat(
        worker_id=beat.session.worker_id,
        identity=beat.session.identity,
        at=beat.at,
        ready=message.ready,
        problem=message.problem,
        cpu_usage=message.cpu_usage,
        memory_usage=message.memory_usage,
        lease=lease if message.ready else None,
    )


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it may be gone already
        await websocket.close(code, reason)
