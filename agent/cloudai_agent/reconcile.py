"""What an agent does next about one run: a pure function of the wish, the container and the time.

The same move as the controller's plan, one level down. It is asked again after every step and every event, so that each
answer is only the next step; a lost event, a restart or a repeated question changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloudai.resources import ENDED_WELL, GIB, Reason, Run, RunPhase
from cloudai_agent.runtime import KILLED, Container, ContainerState, Refusal

TERMINATED = 143  # exit code of a process ended by TERM
NOT_FOUND = 127  # what a shell, and the init process of a container, say of a command that is not there


class Cause(StrEnum):
    """Why the agent itself ended a container."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    STORAGE = "storage"
    FENCED = "fenced"  # the worker's lease ran out


@dataclass(frozen=True, slots=True)
class Ordered:
    """The agent's decision to end a container, and when (ms) it was made."""

    cause: Cause
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known of one run. `now` in ms since the epoch.

    `wish`: the run as the server last told it, None when it is not wanted (any more).
    `progress`: set while an image is really being fetched.
    `logs_stored`: the log has ended and the server has every byte.
    `note`: what the worker has to say about the way it runs tasks.
    """

    wish: Run | None
    container: Container | None
    now: int
    busy: bool = False
    fetched: bool = False
    progress: str | None = None
    refusal: Refusal | None = None
    ordered: Ordered | None = None
    logs_stored: bool = False
    fenced: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have the image ready."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create the container."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start it; only after the server has stored that it is about to."""


@dataclass(frozen=True, slots=True)
class Stop:
    """TERM, grace, KILL; `cause` is remembered. None: nobody will ask."""

    cause: Cause | None


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove the ended container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Report to the server. None leaves a field as it is stored."""

    phase: RunPhase
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    message: str | None = None


Step = Fetch | Create | Start | Stop | Remove | Tell


def next_step(view: View) -> Step | None:
    """The next step, or None where only an event or the time can bring one."""
    if view.busy:
        return _while_busy(view)
    wish, container = view.wish, view.container
    if view.fenced:
        running = container is not None and container.state is ContainerState.RUNNING
        return Stop(view.ordered.cause if view.ordered else Cause.FENCED) if running else None
    if wish is None:
        return _unwanted(container)
    if wish.stop_requested:
        return _stopping(view, wish)
    if view.refusal is not None:
        return _refused(view, view.refusal)
    if container is None:
        return _missing(view, wish)
    if wish.phase in (RunPhase.ASSIGNED, RunPhase.PULLING):
        return Tell(phase=RunPhase.STARTING)
    match container.state:
        case ContainerState.CREATED:
            return _created(view, wish, container)
        case ContainerState.RUNNING:
            return _running(view, wish, container)
        case ContainerState.EXITED:
            return end(view, wish, container) if view.logs_stored else None


def _refused(view: View, refusal: Refusal) -> Tell:
    """A fault of the engine is no failure of the task, which may run elsewhere."""
    phase = RunPhase.LOST if refusal.reason == Reason.WORKER_LOST else RunPhase.FAILED
    return Tell(phase=phase, finished_at=view.now, reason=refusal.reason, message=refusal.message)


def _while_busy(view: View) -> Step | None:
    """A fetch tells how far it is; everything else is awaited."""
    wish = view.wish
    if wish is None or view.progress is None or view.container is not None or wish.stop_requested:
        return None
    if wish.phase in (RunPhase.ASSIGNED, RunPhase.PULLING) and wish.message != view.progress:
        return Tell(phase=RunPhase.PULLING, message=view.progress)
    return None


def _unwanted(container: Container | None) -> Step | None:
    if container is None:
        return None
    return Stop(None) if container.state is ContainerState.RUNNING else Remove()


def _stopping(view: View, wish: Run) -> Step | None:
    container = view.container
    if container is None or container.state is ContainerState.CREATED:
        return Tell(
            phase=RunPhase.STOPPED, finished_at=view.now, reason=Reason.CANCELLED, message="Stopped before it started."
        )
    if wish.phase in (RunPhase.ASSIGNED, RunPhase.PULLING):
        return Tell(phase=RunPhase.STARTING)
    if container.state is ContainerState.RUNNING:
        return Stop(Cause.CANCELLED)
    return end(view, wish, container) if view.logs_stored else None


def _missing(view: View, wish: Run) -> Step:
    if wish.phase not in (RunPhase.ASSIGNED, RunPhase.PULLING):
        # It existed: the server was told only after it was created. It may have run, so it is never started again.
        return Tell(
            phase=RunPhase.FAILED,
            finished_at=view.now,
            reason=Reason.CONTAINER_GONE,
            message=f"The container {wish.run_id} was removed by somebody other than CloudAI; submit the task again.",
        )
    return Create() if view.fetched else Fetch()


def _created(view: View, wish: Run, container: Container) -> Step:
    if wish.phase is RunPhase.STARTING:
        # A start may have failed before this agent's own life.
        return _refused(view, container.refusal) if container.refusal else Start()
    return Tell(
        phase=RunPhase.FAILED,
        finished_at=view.now,
        reason=Reason.CONTAINER_GONE,
        message=f"The container {wish.run_id} was made anew by somebody other than CloudAI; submit the task again.",
    )


def _running(view: View, wish: Run, container: Container) -> Step | None:
    if view.ordered is not None:
        return Stop(view.ordered.cause)
    deadline = deadline_of(wish, container)
    if deadline is not None and view.now >= deadline:
        return Stop(Cause.DEADLINE)
    if wish.phase is RunPhase.STARTING:
        message = view.note or "The container is running."
        return Tell(phase=RunPhase.RUNNING, started_at=container.started_at, message=message)
    return None


def deadline_of(wish: Run, container: Container) -> int | None:
    """When (ms) a started container has had its time; None where it has no limit."""
    if wish.timeout_seconds is None or container.started_at is None:
        return None
    return container.started_at + wish.timeout_seconds * 1000


def end(view: View, wish: Run, container: Container) -> Tell:
    """What a container that has ended says of its attempt."""
    phase, reason, message = _verdict(view, wish, container)
    return Tell(
        phase=phase,
        started_at=container.started_at,
        finished_at=container.finished_at or view.now,
        exit_code=container.exit_code,
        reason=reason,
        message=message,
    )


def _verdict(view: View, wish: Run, container: Container) -> tuple[RunPhase, str | None, str | None]:
    if wish.stop_requested:
        return RunPhase.STOPPED, Reason.CANCELLED, "Stopped as asked."
    cause = _cause(view.ordered, container)
    if cause is Cause.FENCED:
        text = (
            "The worker was cut off for longer than its lease and stopped the container; "
            "check its network to the server."
        )
        return RunPhase.LOST, Reason.WORKER_LOST, text
    if cause is Cause.STORAGE:
        text = f"The container wrote more than the {_gib(wish.resources.storage)} it asked for; raise req_storage."
        return RunPhase.FAILED, Reason.STORAGE_LIMIT_EXCEEDED, text
    if cause is Cause.DEADLINE or _over_time(wish, container):
        text = f"It was stopped after timeout_seconds ({wish.timeout_seconds}); raise it for longer work."
        return RunPhase.FAILED, Reason.DEADLINE_EXCEEDED, text
    if container.exit_code == 0:  # even if the engine ended a child of it for its memory: the command says it coped
        return RunPhase.SUCCEEDED, None, view.note or ENDED_WELL
    if container.oom_killed:
        text = f"The container needed more than the {_gib(wish.resources.memory)} of memory it asked for; raise req_memory."
        return RunPhase.FAILED, Reason.OOM_KILLED, text
    if container.exit_code == NOT_FOUND:
        text = "A command was not found (exit code 127); check its spelling and the image, and see the logs."
        return RunPhase.FAILED, Reason.COMMAND_NOT_FOUND, text
    if container.refusal:
        return RunPhase.FAILED, container.refusal.reason, container.refusal.message
    return RunPhase.FAILED, Reason.EXIT_CODE, _exit_words(container.exit_code)


def _cause(ordered: Ordered | None, container: Container) -> Cause | None:
    """Why the agent ended the container; None where it had come to its own end when the agent decided on it.

    An engine elsewhere has another clock, so what was ended by a signal is believed to be ended by the agent.
    """
    if ordered is None:
        return None
    before = container.finished_at is not None and container.finished_at < ordered.at
    return None if before and container.exit_code not in (KILLED, TERMINATED) else ordered.cause


def _exit_words(code: int | None) -> str:
    if code is None:
        return "The container ended without an exit code; see its logs."
    if code == KILLED:  # engines do not always tell when it was for the memory
        return (
            f"The command ended with exit code {code} (signal {code - 128}); see its logs, and raise req_memory if they "
            "break off without a cause."
        )
    if code > 128:
        return f"The command ended with exit code {code} (signal {code - 128}); see its logs."
    return f"The command ended with exit code {code}; see its logs."


def _over_time(wish: Run, container: Container) -> bool:
    """Stopped for its deadline by an agent that did not live to say so."""
    deadline = deadline_of(wish, container)
    ended_by_signal = container.exit_code in (KILLED, TERMINATED)
    return deadline is not None and ended_by_signal and (container.finished_at or 0) >= deadline


def _gib(amount: int) -> str:
    return f"{amount / GIB:.3g} GiB"
