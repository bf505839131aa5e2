"""What a runtime is: the place where containers live. `docker` and `process` implement it; nothing else in the agent knows
which one it drives.

All methods block and are called from worker threads, never from the event loop; each is bounded by a timeout of its own.
A runtime keeps nothing that matters in memory: `containers()` is the truth, and a new agent process finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from cloudai.resources import GpuShare, Resources, Run

KILLED = 137  # exit code of a process ended by KILL


class ContainerState(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The runtime cannot run an attempt; `reason` of resources.Reason, `message` for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What the runtime knows of one of our containers. Times in ms since the epoch."""

    run_id: str  # its name
    task_id: str
    attempt: int
    state: ContainerState
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    refusal: Refusal | None = None  # why the engine could not start it


class EngineDown(Exception):
    """The engine does not answer; nothing is known of the containers until it does."""


class RunRefused(Exception):
    """The runtime cannot run this; final for the attempt. `reason` of resources.Reason, `message` for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Runtime(Protocol):
    """Operations are idempotent: creating what exists, starting what runs, stopping or removing what is gone are no errors."""

    kind: Literal["docker", "process"]

    def bind(self, cluster_id: str, worker_id: str) -> None:
        """Say whose containers are ours; before any call about containers."""
        ...

    def ping(self) -> None:
        """Raises EngineDown with a sentence that says what does not answer."""
        ...

    def capacity(self) -> Resources:
        """What the machine has, before the operator's flags; of storage what is free."""
        ...

    def containers(self) -> list[Container]:
        """Ours only: same cluster and worker. Raises EngineDown."""
        ...

    def container(self, run_id: str) -> Container | None:
        """One of ours, or None when it does not exist. Raises EngineDown."""
        ...

    def has_image(self, image: str) -> bool: ...

    def pull(self, image: str, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        """Fetch an image; calls `progress` with a short text now and then, gives up quietly once `cancelled()`.

        Raises RunRefused (InvalidImageName, ImageNotFound, ImagePullFailed, ImagePullTimeout) or EngineDown.
        """
        ...

    def create(self, run: Run) -> None:
        """Create (not start) the run's container under its computed name. Raises RunRefused or EngineDown."""
        ...

    def start(self, run_id: str) -> None:
        """Raises RunRefused (CommandNotFound, StartFailed) or EngineDown."""
        ...

    def stop(self, run_id: str, grace_seconds: float) -> None:
        """TERM, then KILL after the grace; returns once it has ended."""
        ...

    def remove(self, run_id: str) -> None:
        """Remove an ended container and all that belongs to it."""
        ...

    def read_log(self, run_id: str, offset: int) -> Iterator[bytes]:
        """Both streams in order from byte `offset`, following until the container has ended and every byte was given."""
        ...

    def storage_used(self) -> dict[str, int]:
        """Bytes that each of our containers has written to its own file system, by run id."""
        ...

    def events(self) -> Iterator[str | None]:
        """Run ids whose container ended or went, as it happens; None when anything may have changed (after a gap). For ever."""
        ...

    def close(self) -> None:
        """Let go of connections; containers go on."""
        ...


def engine_says(words: str) -> str:
    """The message of an attempt that did not start for what the engine's own words say best."""
    return (
        f"The engine says: {words}; correct what it names, in the task, its image or the worker, and submit it again."
    )


def device_list(gpus: tuple[GpuShare, ...]) -> str:
    """The devices of a run as `0,3`: for NVIDIA_VISIBLE_DEVICES and Docker's device requests."""
    return ",".join(str(share.device) for share in gpus)
