"""What the agent knows of its runs: the server's wish, the container as last seen, the log on its way, what was said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cloudai.resources import Run
from cloudai.settings import Settings
from cloudai.wire import Runs
from cloudai_agent.logs import Shipment
from cloudai_agent.memory import Memory
from cloudai_agent.reconcile import Tell, View, deadline_of
from cloudai_agent.runtime import Container, ContainerState, Refusal, Runtime

TELL_AGAIN_SECONDS = 5.0  # a report that the wish does not show by then is made again


class Watched:
    """One run. `changed` asks for a pass over it."""

    def __init__(self, run_id: str, changed: Callable[[str], None]) -> None:
        self.run_id = run_id
        self._changed = changed
        self.wish: Run | None = None
        self.log_stored: int | None = None  # bytes of log the server had when it told the whole wish
        self.container: Container | None = None
        self.stale = False  # the container must be looked at before anything is decided
        self.busy = False  # a call to the runtime is under way
        self.fetched = False
        self.progress: str | None = None
        self.refusal: Refusal | None = None
        self.shipment: Shipment | None = None
        self.telling = False  # the last pass ended with a report
        self.touched = 0.0  # when (monotonic) a call to the runtime last began or ended
        self._told: Tell | None = None
        self._told_at = 0.0

    @property
    def running(self) -> bool:
        return self.container is not None and self.container.state is ContainerState.RUNNING

    def view(self, now: int, memory: Memory, note: str | None, *, fenced: bool) -> View:
        return View(
            wish=self.wish,
            container=self.container,
            now=now,
            busy=self.busy,
            fetched=self.fetched,
            progress=self.progress,
            refusal=self.refusal,
            ordered=memory.ordered.get(self.run_id),
            logs_stored=self.shipment is not None and self.shipment.complete,
            fenced=fenced,
            note=note,
        )

    def progressed(self, text: str) -> None:
        self.progress = text
        self._changed(self.run_id)

    def should_tell(self, tell: Tell) -> bool:
        """True for news, and for what was said long ago and is still not known to the server."""
        now = time.monotonic()
        same = self._told is not None and replace(tell, finished_at=None) == replace(self._told, finished_at=None)
        if same and now - self._told_at < TELL_AGAIN_SECONDS:
            return False
        self._told, self._told_at = tell, now
        return True

    def deadline(self) -> int | None:
        """When (ms) a running container has had its time."""
        if self.wish is None or self.container is None or not self.running:
            return None
        return deadline_of(self.wish, self.container)

    def tell_again(self) -> float | None:
        """When (monotonic) an unanswered report is due again."""
        return self._told_at + TELL_AGAIN_SECONDS if self.telling and self._told is not None else None

    def wishes(self, run: Run | None) -> None:
        self.wish = run
        self._told = None
        self._changed(self.run_id)

    def forget_told(self) -> None:
        self._told = None


class Known:
    """All runs, by id. `wished` is set once the server has told its whole wish; `look` asks for a list of containers."""

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        changed: Callable[[str], None],
        send_log: Callable[[str, int, bytes], None],
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._changed = changed
        self._send_log = send_log
        self.runs: dict[str, Watched] = {}
        self.wished = False
        self._looked = False
        self.look = asyncio.Event()
        self.joined = asyncio.Event()

    def _watched(self, run_id: str) -> Watched:
        if run_id not in self.runs:
            self.runs[run_id] = Watched(run_id, self._changed)
        return self.runs[run_id]

    def forget(self, run_id: str) -> None:
        """Drop a run, if it is neither wanted nor there."""
        watched = self.runs[run_id]
        if watched.wish is None and watched.container is None and not watched.busy and not watched.stale:
            if watched.shipment:
                watched.shipment.close()
            del self.runs[run_id]

    # -- the server's side

    def told(self, message: Runs) -> None:
        """The wish, whole or in part."""
        told = {f"{each.task_id}-{each.attempt}": each for each in message.runs}
        if message.full:
            self.wished = True
            for run_id, watched in self.runs.items():
                if run_id not in told:
                    watched.wishes(None)
        for run_id in message.gone:
            if run_id in self.runs:
                self.runs[run_id].wishes(None)
        for run_id, each in told.items():
            watched = self._watched(run_id)
            if watched.wish is None:
                # New to this agent; until the engine was asked, a container of it may exist.
                watched.stale = not self._looked
            watched.wishes(each.run())
            if each.log_end is not None:
                watched.log_stored = each.log_end
            self.follow(watched, again=each.log_end is not None)

    def disconnected(self) -> None:
        for watched in self.runs.values():
            watched.forget_told()
            if watched.shipment:
                watched.shipment.disconnected()

    # -- the runtime's side

    def found(self, containers: Sequence[Container], asked_at: float) -> None:
        """Every container of ours there was. What was touched since it was asked (monotonic) is looked at by itself."""
        self._looked = True
        seen = {container.run_id: container for container in containers}
        for run_id in seen.keys() | self.runs.keys():
            watched = self._watched(run_id)
            if watched.busy or watched.touched >= asked_at:
                watched.stale = True
            else:
                self.saw(watched, seen.get(run_id))
                if watched.running and watched.shipment:
                    watched.shipment.reopen()
            self._changed(run_id)

    def saw(self, watched: Watched, container: Container | None) -> None:
        watched.stale = False
        watched.container = container
        self.follow(watched)

    def joining(self) -> None:
        """A new connection: what was wished before may be out of date until the server has told the whole."""
        self.wished = False
        self.joined.set()
        self.look.set()

    def stale(self, run_id: str) -> None:
        """Something happened to a container. Of one that is not known, the next look at all of them tells."""
        if run_id in self.runs:
            self.runs[run_id].stale = True
            self._changed(run_id)

    # -- logs

    def follow(self, watched: Watched, *, again: bool = False) -> None:
        """See that the log of a started container is on its way to the server."""
        container = watched.container
        if watched.wish is None or container is None or container.state is ContainerState.CREATED:
            return
        if watched.shipment and again and (watched.log_stored or 0) < watched.shipment.stored:
            watched.shipment.close()  # the server lost what it had: read the container's log again
            watched.shipment = None
        if watched.shipment is None:
            watched.shipment = Shipment(
                self._runtime,
                watched.run_id,
                watched.log_stored or 0,
                self._settings.max_log_bytes,
                lambda: self._changed(watched.run_id),
            )
            again = True
        if again:
            run_id = watched.run_id
            watched.shipment.connected(
                lambda offset, data: self._send_log(run_id, offset, data), watched.log_stored or 0
            )

    def close(self) -> None:
        for watched in self.runs.values():
            if watched.shipment:
                watched.shipment.close()
