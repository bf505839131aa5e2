"""`/ws/telemetry`: what happens in the cluster, to everybody who listens.

Nothing is read while nobody listens. A message is encoded once for all; each client has a short queue, and one that does
not keep up is dropped, never waited for. Events come from the change log, their contents from the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect

from cloudai.api import views
from cloudai.api.answers import envelope
from cloudai.api.changes import Changes
from cloudai.api.convert import instant, maybe_instant
from cloudai.api.places import Places
from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.metrics import Metrics
from cloudai.resources import Task, TaskStatus, WorkerState
from cloudai.settings import Settings
from cloudai.store.protocol import Change, FacadeStore, Kind, TaskQuery

logger = logging.getLogger(__name__)

BACKLOG = 64  # times something was told that a client may be behind; each may be many messages
SHOWN = 1000  # tasks in one telemetry_update
TICK = 1.0  # seconds between looks at who has fallen silent
LEAST = 0.25  # seconds between looks at the workers, however many of them come and go
FAREWELL = 1.0  # seconds a client that is dropped has to be told so
TRY_AGAIN_LATER = 1013


class _Client:
    """What one client is still to be sent; `dropped` once it is too far behind."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Sequence[str]] = asyncio.Queue(BACKLOG)
        self.dropped = asyncio.Event()

    async def send_to(self, websocket: WebSocket, first: Sequence[str]) -> None:
        """Send `first`, then for ever what comes."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            messages = first
            while True:
                for message in messages:
                    await websocket.send_text(message)
                messages = await self.messages.get()


class Telemetry:
    """`places`: None for as many connections as anybody likes."""

    def __init__(
        self, store: FacadeStore, settings: Settings, changes: Changes, places: Places | None, metrics: Metrics
    ) -> None:
        self._store = store
        self._settings = settings
        self._changes = changes
        self._places = places
        self._metrics = metrics
        self._connected: set[_Client] = set()
        self._work: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._changed: dict[str, str] = {}
        self._workers_changed = False
        self._active: set[str] | None = None  # at the last look

    # -- one client

    async def connect(self, websocket: WebSocket) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._places is not None:
                try:
                    await stack.enter_async_context(self._places.taken(websocket.scope))
                except CloudAIError as error:
                    await websocket.send_denial_response(envelope(error))
                    return
            await websocket.accept()
            await self._serve(websocket)

    async def _serve(self, websocket: WebSocket) -> None:
        client = _Client()
        with self._listed(client):  # before the first message is read: what happens meanwhile is told after it
            first: list[str] = []
            with contextlib.suppress(CloudAIError):  # the next periodic message comes when the store answers again
                first.append(await self._update())
            parts = (client.send_to(websocket, first), _left(websocket), client.dropped.wait())
            waits = [asyncio.ensure_future(part) for part in parts]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
                await asyncio.gather(*waits, return_exceptions=True)
        if client.dropped.is_set():
            with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
                async with asyncio.timeout(FAREWELL):
                    await websocket.close(TRY_AGAIN_LATER, "messages were not read in time")

    @contextlib.contextmanager
    def _listed(self, client: _Client) -> Iterator[None]:
        self._connected.add(client)
        self._metrics.websockets.set(len(self._connected))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._run())
        try:
            yield
        finally:
            self._connected.discard(client)
            self._metrics.websockets.set(len(self._connected))
            if not self._connected and self._work is not None:
                self._work.cancel()
                self._work = None

    def _publish(self, messages: Sequence[str]) -> None:
        if not messages:
            return
        for client in list(self._connected):
            try:
                client.messages.put_nowait(messages)
            except asyncio.QueueFull:
                client.dropped.set()
                self._connected.discard(client)
                self._metrics.dropped.inc()

    # -- all clients

    async def close(self) -> None:
        """End the work behind the messages, and the connections with it."""
        for client in list(self._connected):
            client.dropped.set()
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _run(self) -> None:
        """Tell of tasks when they changed, of workers when they changed and every TICK; a telemetry_update as often as the

        setting says.
        """
        loop = asyncio.get_running_loop()
        interval = self._settings.telemetry_seconds
        due = loop.time() + interval
        looked = float("-inf")
        self._active = None
        self._changed = {}  # noted for clients that have all left
        with self._changes.listening(self._note):
            while True:
                self._wake.clear()
                try:
                    await self._tell_of_tasks()
                    if loop.time() >= looked + self._pause():
                        looked = loop.time()
                        await self._tell_of_workers()
                    if loop.time() >= due:
                        due = max(due + interval, loop.time())
                        self._publish([await self._update()])
                except CloudAIError as error:
                    logger.warning("no telemetry while the store does not answer: %s", error)
                    looked = loop.time()
                    due = looked + interval
                except Exception:
                    logger.exception("a fault in the telemetry")
                    looked = loop.time()
                    due = looked + interval
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(min(looked + self._pause(), due) - loop.time(), 0.001)):
                        await self._wake.wait()

    def _note(self, batch: Sequence[Change] | None) -> None:
        if batch is None:
            self._workers_changed = True
            self._wake.set()
            return
        for change in batch:
            if change.kind is Kind.TASK and change.event in _ANNOUNCED:
                self._changed[change.key + change.event] = change.key
                self._wake.set()
            elif change.kind is Kind.WORKER:
                self._workers_changed = True
                self._wake.set()

    def _pause(self) -> float:
        return LEAST if self._workers_changed else TICK

    async def _tell_of_tasks(self) -> None:
        changed, self._changed = self._changed, {}
        if changed:
            try:
                tasks = await self._store.get_tasks(sorted(set(changed.values())))
            except Exception:
                self._changed = changed | self._changed  # to be told once the store answers again
                raise
            self._publish([_event(what.removeprefix(key), tasks[key]) for what, key in changed.items() if key in tasks])

    async def _tell_of_workers(self) -> None:
        """Tell who came and who left since the last look; the first look only learns which workers are active."""
        self._workers_changed = False
        now = now_ms()
        states = {state.worker.worker_id: state for state in await self._store.list_workers()}
        active = {name for name, state in states.items() if state.worker.active(now, self._settings.heartbeat_ms)}
        if self._active is not None:
            come = [_worker_event("worker_registered", states[name], self._settings) for name in active - self._active]
            left = [
                _worker_event("worker_disconnected", states[name], self._settings)
                for name in self._active - active
                if name in states
            ]
            self._publish(come + left)
        self._active = active

    async def _update(self) -> str:
        """The documented telemetry_update."""
        now, heartbeat = now_ms(), self._settings.heartbeat_ms
        workers = await self._store.list_workers()
        tasks: list[Task] = []
        for status in (TaskStatus.RUNNING, TaskStatus.PENDING):
            if len(tasks) < SHOWN:
                tasks += (
                    await self._store.list_tasks(TaskQuery(status=status, limit=SHOWN - len(tasks), brief=True))
                ).tasks
        overview = views.cluster(workers, {}, now, heartbeat)
        cluster = {name: overview[name] for name in _CLUSTER}
        data = {
            "workers": [_usage(state) for state in workers],
            "tasks": [
                {"task_id": task.task_id, "status": task.status.value, "worker_id": task.worker_id, "progress": None}
                for task in tasks
            ],
            "cluster": cluster,
        }
        return _message("telemetry_update", data)


_ANNOUNCED = frozenset({"running", "completed", "failed", "cancelled"})
_CLUSTER = ("total_workers", "active_workers", "available_cpu", "available_memory")


def _message(kind: str, data: dict[str, Any]) -> str:
    return orjson.dumps({"type": kind, "timestamp": instant(now_ms()), "data": data}).decode()


def _usage(state: WorkerState) -> dict[str, Any]:
    return {
        "worker_id": state.worker.worker_id,
        "cpu_usage": state.worker.cpu_usage,
        "memory_usage": state.worker.memory_usage,
        "active_tasks": state.runs,
        "last_heartbeat": state.worker.last_heartbeat // 1000,
    }


def _event(event: str, task: Task) -> str:
    """A start tells when; an end, whichever it was, tells how."""
    data = {
        "task_id": task.task_id,
        "user_id": task.spec.user_id,
        "status": event,
        "worker_id": task.worker_id,
        "started_at": maybe_instant(task.started_at),
    }
    if event == "running":
        return _message("task_started", data)
    end = {"finished_at": maybe_instant(task.finished_at), "exit_code": task.exit_code, "reason": task.reason}
    return _message("task_completed", data | end)


def _worker_event(kind: str, state: WorkerState, settings: Settings) -> str:
    return _message(kind, views.worker(state, now_ms(), settings.heartbeat_ms))


async def _left(websocket: WebSocket) -> None:
    """Ends when the client goes; what it says meanwhile is not listened to."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
