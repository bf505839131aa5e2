"""Real agents in the test's event loop, joined to a real facade over a real store; runs are placed as the controller does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cloudai.resources import Resources, Run, RunPhase, TaskSpec, TaskStatus, Worker
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore, open_store
from cloudai_agent.loop import Agent
from cloudai_agent.process import ProcessRuntime
from cloudai_agent.runtime import Runtime
from tests.api.conftest import serving

MIB = 1024 * 1024
PATIENCE = 60.0  # seconds; whatever takes longer counts as never
TOKEN = "token"
T = TypeVar("T")


@dataclass(frozen=True)
class Joined:
    """A facade and its store. `port` is where agents join; a test may put a network of its own in between."""

    store: SqlStore
    settings: Settings
    port: int

    @contextlib.asynccontextmanager
    async def agent(
        self, runtime: Runtime | None = None, port: int | None = None, stop: asyncio.Event | None = None
    ) -> AsyncIterator[Runtime]:
        """An agent with plain processes unless told otherwise; ended by `stop`, or hard, as by a kill, with the block."""
        settings = self.settings.model_copy(update={"server": f"http://127.0.0.1:{port or self.port}"})
        runtime = runtime or ProcessRuntime(settings)
        stop = stop or asyncio.Event()
        running = asyncio.ensure_future(Agent(settings, TOKEN, runtime).run(stop))
        try:
            yield runtime
        finally:
            over = running.done()
            if not stop.is_set():
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            runtime.close()
            assert not over or stop.is_set(), "the agent ended by itself"

    @contextlib.contextmanager
    def processes(self) -> Iterator[ProcessRuntime]:
        """The worker's processes, seen without an agent."""
        runtime = ProcessRuntime(self.settings)
        runtime.bind(self.store.cluster_id, "worker-1")
        yield runtime
        runtime.close()

    async def run(self, command: str, storage: int = 0, image: str = "image", **fields: Any) -> Run:
        """A new run of worker-1."""
        resources = Resources(100, 64 * MIB, storage, 0)
        spec = TaskSpec(user_id="user", image=image, command=command, resources=resources)
        task = await self.store.create_task(spec)
        run = Run(
            task_id=task.task_id,
            attempt=1,
            worker_id="worker-1",
            user_id=spec.user_id,
            image=spec.image,
            command=command,
            resources=resources,
            **fields,
        )
        placed = replace(task, status=TaskStatus.PENDING, attempt=1, worker_id="worker-1")
        assert (await self.store.commit([[placed, run]])).applied == [True]
        return run

    async def change(self, run_id: str, **fields: Any) -> Run:
        """Write as the controller does: again where somebody else was faster."""
        while True:
            run = replace((await self.store.get_runs([run_id]))[run_id], **fields)
            committed = await self.store.commit([[run]])
            if committed.applied == [True]:
                return (await self.store.get_runs([run_id]))[run_id]

    async def until(self, run: Run, *phases: RunPhase) -> Run:
        """Wait until the run has come to one of `phases`."""

        async def read() -> Run:
            return (await self.store.get_runs([run.run_id]))[run.run_id]

        return await self._until(read, lambda found: found.phase in phases)

    async def until_worker(self, true: Callable[[Worker], bool]) -> Worker:
        """Wait until `true` is said of worker-1."""

        async def read() -> Worker | None:
            return (await self.store.get_workers(["worker-1"])).get("worker-1")

        return await self._until(read, true)

    async def _until(self, read: Callable[[], Awaitable[T | None]], true: Callable[[T], bool]) -> T:
        async with asyncio.timeout(PATIENCE):
            changes = self.store.watch(0)
            async with contextlib.aclosing(changes):  # type: ignore[type-var]
                async for _ in changes:
                    found = await read()
                    if found is not None and true(found):
                        return found
        raise AssertionError("the changes ended")

    async def log(self, run: Run) -> str:
        return (await self.store.read_log(run.task_id, run.attempt, 0, 10 * MIB)).data.decode()


@contextlib.asynccontextmanager
async def joined(directory: Path, **settings: Any) -> AsyncIterator[Joined]:
    """A facade with quick heartbeats; `settings` beyond these. What its agents left running is ended with it."""
    given: dict[str, Any] = {
        "data_dir": directory,
        "rate_limit_enabled": False,
        "heartbeat_seconds": 0.2,
        "stop_grace_seconds": 0.5,
        "worker_id": "worker-1",
        "health_port": 0,
    }
    chosen = Settings(**(given | settings))
    store = await open_store(chosen.url)
    try:
        await store.add_token(hashlib.sha256(TOKEN.encode()).digest(), "test")
        async with serving(store, chosen) as server:
            place = Joined(store, chosen, server.port)
            try:
                yield place
            finally:
                with place.processes() as left:
                    for container in await asyncio.to_thread(left.containers):
                        await asyncio.to_thread(left.stop, container.run_id, 0)
    finally:
        await store.close()


async def eventually(what: str, probe: Any) -> None:
    """Look, in a thread, until `probe()` is true; an AssertionError that names `what` when it never is."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not await asyncio.to_thread(probe):
        assert asyncio.get_running_loop().time() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.02)
