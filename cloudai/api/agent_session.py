"""One connected agent: what it says goes to the store in order, what it is to know goes out through a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from starlette.websockets import WebSocket, WebSocketDisconnect

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError, Code
from cloudai.resources import Run
from cloudai.store.protocol import Store
from cloudai.wire import (
    HeartbeatMessage,
    LogAck,
    LogHeader,
    Message,
    Report,
    RunMessage,
    Runs,
    decode_log,
    from_agent,
)

QUEUED_OUT = 10_000  # messages; an agent that lets more wait is disconnected and asks for the whole again
QUEUED_IN = 256
REMEMBERED = 1000  # runs that are gone
GONE = 1012
CLOSING_SECONDS = 5.0

Said = Report | tuple[LogHeader, bytes]


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat and when it came (ms)."""

    session: Session
    message: HeartbeatMessage
    at: int


class Session:
    """Made when a worker has registered. `token`: the digest of the one that let it in."""

    def __init__(self, websocket: WebSocket, token: bytes, worker_id: str, identity: str) -> None:
        self.token = token
        self.worker_id = worker_id
        self.identity = identity
        self._websocket = websocket
        self._out: asyncio.Queue[Message | None] = asyncio.Queue(QUEUED_OUT)
        self._in: asyncio.Queue[Said] = asyncio.Queue(QUEUED_IN)
        self._told: dict[str, int] = {}  # live run: the version that was sent last
        self._gone: dict[str, None] = {}  # runs that were said to be gone, oldest first
        self.whole = False  # the whole wish was sent
        self._late: set[str] | None = None  # runs that changed while the whole is read
        self._ended = "the agent closed the connection"
        self._ending = asyncio.Event()
        self.heard_at = now_ms()

    # -- to the agent

    def send(self, message: Message) -> None:
        try:
            self._out.put_nowait(message)
        except asyncio.QueueFull:
            self.end("the agent does not read")

    def end(self, why: str) -> None:
        """Close the connection; the agent comes back and gets the whole. What it says from now on is left unheard."""
        self._ended = why
        self._ending.set()
        while self._out.full():
            self._out.get_nowait()
        self._out.put_nowait(None)

    def begin_whole(self) -> bool:
        """From here on until `send_whole` changes are noted, not sent. True when it is the first time."""
        self._late = set()
        return not self.whole

    def send_whole(self, runs: Sequence[Run], log_ends: Mapping[str, int]) -> list[str]:
        """Send every live run, with the ends of logs where given; returns the ids of those that changed meanwhile."""
        late, self._late = sorted(self._late or ()), None
        self.whole = True
        self._told = {run.run_id: run.version for run in runs}
        self.send(Runs(full=True, runs=tuple(RunMessage.of(run, log_ends.get(run.run_id)) for run in runs)))
        return late

    def send_changed(self, runs: Iterable[Run]) -> None:
        """Send those that the agent does not know in this version; finished ones as no longer wanted."""
        changed, gone = [], []
        for run in runs:
            if self._late is not None:
                self._late.add(run.run_id)
            elif run.phase.terminal:
                gone.append(run.run_id)
                self._forget(run.run_id)
            elif run.run_id in self._gone:
                continue  # read before its end, told after it
            elif self._told.get(run.run_id, 0) < run.version:
                self._told[run.run_id] = run.version
                changed.append(RunMessage.of(run))
        if changed or gone:
            self.send(Runs(runs=tuple(changed), gone=tuple(gone)))

    def _forget(self, run_id: str) -> None:
        self._told.pop(run_id, None)
        self._gone[run_id] = None
        if len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]

    # -- serving

    async def serve(self, store: Store, beats: list[Beat]) -> None:
        """Until one side closes. Raises what a bad message or an unreachable store raises."""
        works = (self._send(), self._receive(beats), self._store(store), self._insist())
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # raised where the agent has gone
            while (message := await self._out.get()) is not None:
                await self._websocket.send_text(message.model_dump_json())
            await self._websocket.close(GONE, self._ended)

    async def _insist(self) -> None:
        """An agent that does not read must not keep a connection that is to be closed."""
        await self._ending.wait()
        await asyncio.sleep(CLOSING_SECONDS)

    async def _receive(self, beats: list[Beat]) -> None:
        while True:
            frame = await self._websocket.receive()
            if frame["type"] == "websocket.disconnect":
                return
            if self._ending.is_set():
                continue
            if (data := frame.get("bytes")) is not None:
                await self._in.put(decode_log(data))
                continue
            message = from_agent.validate_json(frame["text"])
            if isinstance(message, HeartbeatMessage):
                self.heard_at = now_ms()
                beats.append(Beat(self, message, self.heard_at))
            elif isinstance(message, Report):
                await self._in.put(message)
            else:
                raise ValueError("`register` may be said once")

    async def _store(self, store: Store) -> None:
        """What has gathered goes to the store together, in order, to share commits."""
        while True:
            said = [await self._in.get()]
            while not self._in.empty():
                said.append(self._in.get_nowait())
            await asyncio.gather(*(self._pass_on(store, each) for each in said))

    async def _pass_on(self, store: Store, said: Said) -> None:
        run_id = f"{said.task_id}-{said.attempt}" if isinstance(said, Report) else said[0].run_id
        try:
            if isinstance(said, Report):
                run = await store.report_run(said.for_worker(self.worker_id))
                known = run is not None
                if run is not None:
                    self.send_changed([run])
            else:
                header, data = said
                known = run_id in self._told  # nobody writes the logs of another's runs
                if known:
                    self.send(LogAck(run_id=run_id, end=await store.append_log(run_id, header.offset, data)))
        except CloudAIError as error:
            if error.code is not Code.TASK_NOT_FOUND:
                raise
            known = False  # deleted
        if not known:
            self.send(Runs(gone=(run_id,)))
