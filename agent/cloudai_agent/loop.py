"""The agent: keeps each run's container as the server wishes it. `reconcile.next_step` decides, this acts.

Everything here belongs to one event loop; the runtime's blocking calls happen in threads, at most one a run at a time.
A pass over a run is asked for by a message, an event of the runtime, the end of a call, or the time; it may be asked for
too often without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cloudai.clock import now_ms
from cloudai.resources import GIB, MOST_GPUS, Resources
from cloudai.settings import Settings
from cloudai.wire import (
    LONGEST_PROBLEM,
    HeartbeatAck,
    HeartbeatMessage,
    LogAck,
    Register,
    Registered,
    Report,
    Runs,
)
from cloudai_agent import gpus, metrics, telemetry
from cloudai_agent.health import Health, local_address
from cloudai_agent.lease import clock
from cloudai_agent.link import Link
from cloudai_agent.memory import Memory, recall
from cloudai_agent.reconcile import (
    Cause,
    Create,
    Fetch,
    Ordered,
    Remove,
    Start,
    Step,
    Stop,
    Tell,
    next_step,
)
from cloudai_agent.runs import Known, Watched
from cloudai_agent.runtime import Container, ContainerState, EngineDown, Refusal, RunRefused, Runtime

log = logging.getLogger("cloudai.agent")

T = TypeVar("T")
CALLS = 64  # short runtime calls at a time
LOOK_SECONDS = 30.0  # how often all containers are listed again: repairs what an event did not tell
PING_SECONDS = 10.0  # how often the engine is asked whether it is there
PROGRESS_SECONDS = 1.0  # between reports of how far a pull is
LEASE_LOOK_SECONDS = 5.0  # while it runs: no timer goes on in a machine that is suspended, as the lease does
RETRY_SECONDS = 1.0  # between questions to an engine that does not answer
STOPPED = "its agent was stopped"
PROCESS_NOTE = "Runs as a plain process of the worker: the image is ignored."


class Agent:
    """One worker. `run` returns soon after `stop` is set; containers go on and are taken up by the next agent."""

    def __init__(self, settings: Settings, token: str, runtime: Runtime) -> None:
        self._settings = settings
        self._runtime = runtime
        self._worker_id = settings.worker_id or "worker-1"
        self._link = Link(settings.server, token, self)
        self._memory: Memory = recall(Path(settings.data_dir), self._worker_id)
        self._known: Known = Known(runtime, settings, self._changed, self._link.send_log)
        self._problem: str | None = "the engine was not asked yet"
        self._capacity: Resources | None = None
        self._address = ""
        self._note = PROCESS_NOTE if runtime.kind == "process" else None
        self._heartbeat_seconds = 10.0
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._beat = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._fenced = False  # the lease was over when it was last looked at
        self._bound: str | None = None

    async def run(self, stop: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._short = ThreadPoolExecutor(CALLS, thread_name_prefix="runtime")
        with Health(self._settings.health_port, lambda: self._problem) as health:
            host = self._settings.advertise_address or local_address(self._settings.server)
            self._address = f"{host}:{health.port}"
            if self._memory.cluster_id:
                self._bind(self._memory.cluster_id)
            works = [self._watch_engine(), self._reconcile(), self._heartbeats(), self._watch_storage()]
            tasks = [asyncio.ensure_future(work) for work in works]
            asked = asyncio.ensure_future(stop.wait())
            try:
                done, _ = await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                self._stopping = True
                await self._link.say_last(self._sign_of_life())
            finally:
                self._stopping = True
                for task in (asked, *tasks, *self._calls):
                    task.cancel()
                await asyncio.gather(asked, *tasks, *self._calls, return_exceptions=True)
                self._known.close()
                self._short.shutdown(wait=False, cancel_futures=True)

    def what_goes_on(self) -> str | None:
        """What to know of an agent that was stopped, where containers of its server's tasks live on."""
        live = sum(watched.running for watched in self._known.runs.values())
        lease = self._memory.lease.seconds
        if not live or lease is None:
            return None
        return (
            f"{live} of its containers go on, and nobody stops them when the lease of {lease:g} s is over: start the agent "
            "again before, else their tasks count as lost and may run a second time beside them."
        )

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._short, lambda: function(*arguments))

    async def _await(self, function: Callable[..., T], *arguments: object) -> T:
        """A call that may take as long as an image or a container likes, in a thread that no other call waits for; nor does the
        end of this process.
        """
        outcome: Future[T] = Future()

        def work() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                outcome.set_result(function(*arguments))
            except Exception as error:  # noqa: BLE001 - told to who waits
                outcome.set_exception(error)

        threading.Thread(target=work, name="runtime-long", daemon=True).start()
        return await asyncio.wrap_future(outcome)

    async def _ask(self, function: Callable[..., T], *arguments: object) -> T:
        """A question about the engine as a whole. Raises EngineDown, whatever it was that went wrong."""
        try:
            return await self._call(function, *arguments)
        except EngineDown:
            raise
        except Exception as error:
            log.exception("the %s runtime failed unexpectedly", self._runtime.kind)
            raise EngineDown(f"the {self._runtime.kind} runtime failed: {error}") from error

    def _bind(self, cluster_id: str) -> None:
        """Once a cluster: binding anew would disturb calls under way."""
        if cluster_id != self._bound:
            self._runtime.bind(cluster_id, self._worker_id)
            self._bound = cluster_id

    # -- the engine

    async def _watch_engine(self) -> None:
        """Ask until the engine answers, join the cluster, then look again whenever something may have been missed."""
        await self._until_engine_answers(look=False)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run())
            group.create_task(self._listen())
            due = time.monotonic()
            while True:
                look = self._known.look.is_set() or time.monotonic() >= due
                self._known.look.clear()
                await self._until_engine_answers(look)
                if look:
                    due = time.monotonic() + LOOK_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        await self._known.look.wait()

    async def _until_engine_answers(self, look: bool) -> None:
        while not await self._engine_answers(look):  # noqa: ASYNC110 - an engine tells nobody that it is back
            await asyncio.sleep(RETRY_SECONDS)
        if self._problem is not None:
            log.info("the %s runtime answers", self._runtime.kind)
            self._problem = None
            self._beat.set()

    async def _engine_answers(self, look: bool) -> bool:
        """Whether it is there; where it was not, or `look` is asked for, whether it can tell of our containers, too."""
        try:
            await self._ask(self._runtime.ping)
            if self._capacity is None:
                self._capacity = await self._ask(capacity, self._runtime, self._settings, self._bound is not None)
            if self._memory.cluster_id and (look or self._problem is not None):
                await self._look()
        except EngineDown as error:
            self._lost_engine(error)
            return False
        return True

    def _lost_engine(self, error: EngineDown) -> None:
        problem = str(error)[:LONGEST_PROBLEM]  # no more of it can be told
        if self._problem != problem:
            log.warning("the %s runtime does not answer: %s", self._runtime.kind, error)
            self._problem = problem
            self._beat.set()
        self._known.look.set()

    async def _look(self) -> None:
        """List all our containers. Raises EngineDown."""
        asked_at = time.monotonic()
        found = await self._ask(self._runtime.containers)
        self._known.found(found, asked_at)
        if self._known.wished:  # what is neither wished nor there is asked about no more
            for run_id in self._memory.ordered.keys() - self._known.runs.keys():
                del self._memory.ordered[run_id]
        metrics.CONTAINERS.set(sum(container.state is ContainerState.RUNNING for container in found))

    async def _listen(self) -> None:
        """Pass the runtime's events on, from a thread that ends with the process."""
        events: asyncio.Queue[str | None] = asyncio.Queue()

        def listen() -> None:
            for run_id in self._runtime.events():
                try:
                    self._loop.call_soon_threadsafe(events.put_nowait, run_id)
                except RuntimeError:
                    return

        while not self._memory.cluster_id:
            await self._known.joined.wait()
        threading.Thread(target=listen, name="events", daemon=True).start()
        while True:
            run_id = await events.get()
            if run_id is None:
                self._known.look.set()
            else:
                self._known.stale(run_id)

    # -- reconciling

    def _changed(self, run_id: str) -> None:
        self._dirty.add(run_id)
        self._wake.set()

    async def _reconcile(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._until_next_time()):
                    await self._wake.wait()
            except TimeoutError:
                self._dirty.update(self._known.runs)
            self._wake.clear()
            self._look_at_lease()
            dirty, self._dirty = self._dirty, set()
            for run_id in dirty:
                self._step(run_id)

    def _look_at_lease(self) -> None:
        """A lease that ends or begins again concerns every run."""
        fenced = self._memory.lease.over(clock())
        if fenced != self._fenced:
            self._fenced = fenced
            self._dirty.update(self._known.runs)
            if fenced:
                log.warning("cut off from the server for longer than the lease: containers are stopped")

    def _until_next_time(self) -> float | None:
        """Seconds until the lease, a deadline or an unanswered report needs a look."""
        times: list[float] = []
        if self._problem is None and self._known.wished:
            idle = [watched for watched in self._known.runs.values() if not watched.busy]
            times += [(ends - now_ms()) / 1000 for watched in idle if (ends := watched.deadline()) is not None]
            times += [again - time.monotonic() for watched in idle if (again := watched.tell_again()) is not None]
        lease_ends = self._memory.lease.ends_at()
        if lease_ends is not None and not self._fenced:
            times.append(min(lease_ends - clock(), LEASE_LOOK_SECONDS))
        return max(0.01, min(times)) if times else None

    def _step(self, run_id: str) -> None:
        watched = self._known.runs.get(run_id)
        if watched is None or self._problem is not None or self._stopping:
            return
        if watched.stale and not watched.busy:
            self._operate(watched, self._inspect)
            return
        if not self._known.wished and not self._memory.lease.over(clock()):
            return  # before the server has told its wish, nothing is known to be unwanted
        view = watched.view(now_ms(), self._memory, self._note, fenced=self._memory.lease.over(clock()))
        step = next_step(view)
        watched.telling = isinstance(step, Tell)
        if step is None:
            self._known.forget(run_id)
            return
        self._act(watched, step)

    def _act(self, watched: Watched, step: Step) -> None:
        match step:
            case Tell():
                if watched.should_tell(step):
                    self._link.send(_report(watched, step))
            case Fetch():
                self._operate(watched, self._fetch)
            case Create():
                self._operate(watched, self._create)
            case Start():
                self._operate(watched, self._start)
            case Stop(cause):
                self._operate(watched, self._stop, cause)
            case Remove():
                self._operate(watched, self._remove)

    def _operate(self, watched: Watched, work: Callable[..., Coroutine[None, None, None]], *arguments: object) -> None:
        """Do one thing to a run's container; then look at the run again."""
        watched.busy = True
        watched.touched = time.monotonic()

        async def operate() -> None:
            try:
                await work(watched, *arguments)
            except EngineDown as error:
                watched.stale = True  # it may or may not have happened
                self._lost_engine(error)
            except RunRefused as error:
                watched.refusal = Refusal(error.reason, error.message)
            except Exception:
                log.exception("a call for %s failed unexpectedly", watched.run_id, extra={"run_id": watched.run_id})
                watched.stale = True
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                watched.busy = False
                watched.touched = time.monotonic()
                self._changed(watched.run_id)

        task = asyncio.ensure_future(operate())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _inspect(self, watched: Watched) -> None:
        watched.stale = False
        self._known.saw(watched, await self._call(self._runtime.container, watched.run_id))

    async def _fetch(self, watched: Watched) -> None:
        wish = watched.wish
        assert wish is not None

        told_at = 0.0
        given_up = False

        def progress(text: str) -> None:
            nonlocal told_at
            if time.monotonic() - told_at >= PROGRESS_SECONDS:
                told_at = time.monotonic()
                self._loop.call_soon_threadsafe(watched.progressed, text)

        def cancelled() -> bool:
            nonlocal given_up
            unwanted = watched.wish is None or watched.wish.stop_requested
            given_up = given_up or self._stopping or unwanted or self._memory.lease.over(clock())
            return given_up

        present = await self._call(self._runtime.has_image, wish.image)
        if not present:
            watched.progressed(f"Pulling {wish.image}")
            await self._await(self._runtime.pull, wish.image, progress, cancelled)
        watched.progress = None
        watched.fetched = not given_up  # a lease may begin again, and the run be wished still

    async def _create(self, watched: Watched) -> None:
        assert watched.wish is not None
        wish = watched.wish
        await self._call(self._runtime.create, wish)
        watched.container = Container(
            run_id=watched.run_id, task_id=wish.task_id, attempt=wish.attempt, state=ContainerState.CREATED
        )

    async def _start(self, watched: Watched) -> None:
        assert watched.container is not None
        if self._memory.lease.over(clock()):
            return
        asked_at = now_ms()  # a start that is told too early by a moment never lies after the end
        await self._call(self._runtime.start, watched.run_id)
        metrics.STARTED.inc()
        # An event may have told its end already; then the look that follows knows better.
        watched.container = replace(watched.container, state=ContainerState.RUNNING, started_at=asked_at)
        self._known.follow(watched)

    async def _stop(self, watched: Watched, cause: Cause | None) -> None:
        if cause is not None:
            self._order(watched.run_id, cause)
        log.info("stopping %s (%s)", watched.run_id, cause or "not wanted any more", extra={"run_id": watched.run_id})
        await self._await(self._runtime.stop, watched.run_id, self._memory.grace_seconds)
        watched.stale = True

    def _order(self, run_id: str, cause: Cause) -> None:
        """Take down, before it is done, that and why a container is to end; the first cause stays."""
        if run_id not in self._memory.ordered:
            self._memory.ordered[run_id] = Ordered(cause, now_ms())
            self._memory.save()

    async def _remove(self, watched: Watched) -> None:
        await self._call(self._runtime.remove, watched.run_id)
        watched.container, watched.stale = None, False

    # -- storage

    async def _watch_storage(self) -> None:
        while True:
            await asyncio.sleep(self._settings.storage_check_seconds)
            limited = {
                watched.run_id: watched.wish.resources.storage
                for watched in self._known.runs.values()
                if watched.wish and watched.wish.resources.storage and watched.running
            }
            if not limited or self._problem is not None:
                continue
            try:
                used = await self._ask(self._runtime.storage_used)
            except EngineDown as error:
                self._lost_engine(error)
                continue
            for run_id, limit in limited.items():
                if used.get(run_id, 0) > limit:
                    self._order(run_id, Cause.STORAGE)
                    self._changed(run_id)

    # -- what the link tells

    def register(self) -> tuple[Register, float]:
        assert self._capacity is not None
        amounts = self._capacity
        message = Register(
            worker_id=self._worker_id,
            identity=self._memory.identity,
            address=self._address,
            runtime=self._runtime.kind,
            cpu=amounts.cpu,
            memory=amounts.memory,
            storage=amounts.storage,
            gpu=amounts.gpu,
            ready=self._problem is None,
            problem=self._problem,
        )
        return message, clock()

    def registered(self, terms: Registered, sent_at: float) -> None:
        log.info("joined %s as %s", self._link.url, self._worker_id)
        metrics.CONNECTED.set(1)
        self._heartbeat_seconds = terms.heartbeat_seconds
        memory = self._memory
        memory.joins(terms.cluster_id)
        memory.grace_seconds = terms.stop_grace_seconds
        memory.lease.seconds = terms.lease_seconds
        memory.lease.renew(sent_at)
        memory.save()
        self._bind(terms.cluster_id)
        self._known.joining()
        self._beat.set()

    def told(self, runs: Runs) -> None:
        self._known.told(runs)

    def acknowledged(self, beat: HeartbeatAck) -> None:
        self._memory.lease.renew(beat.sent_at)
        self._memory.save()

    def stored(self, ack: LogAck) -> None:
        watched = self._known.runs.get(ack.run_id)
        if watched and watched.shipment:
            watched.shipment.acknowledged(ack.end)

    def disconnected(self) -> None:
        metrics.CONNECTED.set(0)
        self._known.disconnected()

    async def _heartbeats(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_seconds):
                    await self._beat.wait()
            self._beat.clear()
            self._link.send(self._sign_of_life())

    def _sign_of_life(self) -> HeartbeatMessage:
        """The last one says that no other follows: nothing more is to be placed here until an agent is back."""
        problem = STOPPED if self._stopping else self._problem
        cpu, memory = telemetry.usage()
        return HeartbeatMessage(
            sent_at=clock(),
            ready=problem is None,
            problem=problem,
            cpu_usage=cpu,
            memory_usage=memory,
        )


def _report(watched: Watched, tell: Tell) -> Report:
    assert watched.wish is not None
    return Report(
        task_id=watched.wish.task_id,
        attempt=watched.wish.attempt,
        phase=tell.phase,
        started_at=tell.started_at,
        finished_at=tell.finished_at,
        exit_code=tell.exit_code,
        reason=tell.reason,
        message=tell.message[:2000] if tell.message else None,
    )


def capacity(runtime: Runtime, settings: Settings, bound: bool) -> Resources:
    """What the worker offers: the operator's figures, else all cores, 90 % of the memory and 80 % of the free storage.

    `bound`: there may be containers of ours. What they have written is theirs already, so it counts as free.
    """
    machine = runtime.capacity()
    if settings.storage is not None:
        storage = round(settings.storage * GIB)
    else:
        ours = sum(runtime.storage_used().values()) if bound else 0
        storage = (machine.storage + ours) * 8 // 10
    return Resources(
        cpu=machine.cpu if settings.cpu is None else round(settings.cpu * 1000),
        memory=machine.memory * 9 // 10 if settings.memory is None else round(settings.memory * GIB),
        storage=storage,
        gpu=1000 * (min(gpus.count(), MOST_GPUS) if settings.gpu is None else settings.gpu),
    )
