"""The nouns of CloudAI and the only table of allowed state changes.

Everything here is a plain immutable value: no clock, no I/O, no library beyond the standard one. Both sides (controller
and agent), the store and the facade speak in these types, so a rule about them (what fits, what may follow what) is
written once, here.

Units: amounts are integers (milli-cores, bytes, milli-GPUs), so sums never drift; times are integer milliseconds since
the Unix epoch. The edges (HTTP, command line) convert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

GIB = 1024**3
WORKER_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
MOST_GPUS = 64  # of one worker: what is free of each is counted


class TaskStatus(StrEnum):
    """What a client reads as a task's `status`."""

    QUEUED = "queued"
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})
ACTIVE_STATUSES = frozenset(TaskStatus) - TERMINAL_STATUSES
PLACED_STATUSES = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING})

# A pending task always passes through running on its way to completed, so that whoever follows the changes sees it
# start. A terminal status never changes.
TASK_TRANSITIONS: Mapping[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.QUEUED: frozenset({TaskStatus.PENDING, TaskStatus.CANCELLED}),
    TaskStatus.PENDING: frozenset({TaskStatus.RUNNING, TaskStatus.QUEUED, TaskStatus.FAILED, TaskStatus.CANCELLED}),
    TaskStatus.RUNNING: frozenset(
        {TaskStatus.QUEUED, TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED},
    ),
    TaskStatus.COMPLETED: frozenset(),
    TaskStatus.FAILED: frozenset(),
    TaskStatus.CANCELLED: frozenset(),
}


class RunPhase(StrEnum):
    """How far one attempt has come; written by the worker that has it, except LOST (the controller's verdict)."""

    ASSIGNED = "assigned"  # placed by the controller, not yet taken up
    PULLING = "pulling"  # the image is being fetched
    STARTING = "starting"  # the container exists or is about to; it may start only once the store holds this phase
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"  # ended because the wish was withdrawn; the container is proven gone
    LOST = "lost"  # the worker's lease ran out

    @property
    def terminal(self) -> bool:
        return self in TERMINAL_PHASES


ENDED_WELL = "The command ended with exit code 0."  # the message of a task or run of which nothing else is to be said
TERMINAL_PHASES = frozenset({RunPhase.SUCCEEDED, RunPhase.FAILED, RunPhase.STOPPED, RunPhase.LOST})

_ENDS_BEFORE_START = frozenset({RunPhase.FAILED, RunPhase.STOPPED, RunPhase.LOST})
RUN_TRANSITIONS: Mapping[RunPhase, frozenset[RunPhase]] = {
    RunPhase.ASSIGNED: _ENDS_BEFORE_START | {RunPhase.PULLING, RunPhase.STARTING},
    RunPhase.PULLING: _ENDS_BEFORE_START | {RunPhase.STARTING},
    # A container may end before its start was reported, so STARTING may be followed by any end.
    RunPhase.STARTING: TERMINAL_PHASES | {RunPhase.RUNNING},
    RunPhase.RUNNING: TERMINAL_PHASES,
    RunPhase.SUCCEEDED: frozenset(),
    RunPhase.FAILED: frozenset(),
    RunPhase.STOPPED: frozenset(),
    RunPhase.LOST: frozenset(),
}


class Reason(StrEnum):
    """Why a task waits or ended: short and stable, for programs; the message beside it is for people."""

    CANCELLED = "Cancelled"
    EXIT_CODE = "ExitCode"
    OOM_KILLED = "OOMKilled"
    STORAGE_LIMIT_EXCEEDED = "StorageLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    INVALID_IMAGE_NAME = "InvalidImageName"
    IMAGE_NOT_FOUND = "ImageNotFound"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    IMAGE_PULL_TIMEOUT = "ImagePullTimeout"
    COMMAND_NOT_FOUND = "CommandNotFound"
    START_FAILED = "StartFailed"
    CONTAINER_GONE = "ContainerGone"  # removed by somebody other than CloudAI
    WORKER_LOST = "WorkerLost"
    # While waiting
    WAITING_FOR_CAPACITY = "WaitingForCapacity"
    TOO_LARGE = "TooLargeForEveryWorker"
    NO_WORKERS = "NoWorkers"
    NO_CONTROLLER = "NoController"
    WORKER_INACTIVE = "WorkerInactive"
    # On Kubernetes only
    EVICTED = "Evicted"
    PREEMPTED = "Preempted"
    POD_REFUSED = "PodRefused"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    WAITING_FOR_ADMISSION = "WaitingForAdmission"
    WAITING_FOR_NODE = "WaitingForNode"


REASON_MEANING: Mapping[Reason, str] = {
    Reason.CANCELLED: "A client asked for its end, and its container is gone.",
    Reason.EXIT_CODE: "The command ended with an exit code other than 0; see `exit_code` and the logs.",
    Reason.OOM_KILLED: "It needed more memory than `req_memory`.",
    Reason.STORAGE_LIMIT_EXCEEDED: "It wrote more than `req_storage`.",
    Reason.DEADLINE_EXCEEDED: "It ran longer than `timeout_seconds`.",
    Reason.INVALID_IMAGE_NAME: "The engine does not take this as the name of an image.",
    Reason.IMAGE_NOT_FOUND: "The registry has no such image, or does not show it to this worker.",
    Reason.IMAGE_PULL_FAILED: "The image could not be fetched: the registry did not answer, refused, or broke off.",
    Reason.IMAGE_PULL_TIMEOUT: "Fetching the image took longer than `CLOUDAI_PULL_TIMEOUT_SECONDS`.",
    Reason.COMMAND_NOT_FOUND: "The image has no such program.",
    Reason.START_FAILED: "The engine could not create or start the container; the message has its words.",
    Reason.CONTAINER_GONE: "Somebody other than CloudAI removed the container.",
    Reason.WORKER_LOST: "The worker was cut off for longer than the lease.",
    Reason.WAITING_FOR_CAPACITY: "Waits: every worker that could hold it is busy; the message says what is short.",
    Reason.TOO_LARGE: "Waits: it asks for more than any worker has.",
    Reason.NO_WORKERS: "Waits: no worker is active.",
    Reason.NO_CONTROLLER: "No controller is at work: nothing is started or stopped, and no end is told, until one is.",
    Reason.WORKER_INACTIVE: "Its worker is not active: the task may go on there, or be lost with it; the message says more.",
    Reason.EVICTED: "Kubernetes: its node ended it, for want of resources, a drain or a shutdown.",
    Reason.PREEMPTED: "Kubernetes: the scheduler ended it to make room for a Pod of higher priority.",
    Reason.POD_REFUSED: "Kubernetes: the cluster does not admit a Pod like this; the message has its words.",
    Reason.UNSCHEDULABLE: "Kubernetes, waits: no node can take it; the message has the scheduler's words.",
    Reason.QUOTA_EXCEEDED: "Kubernetes, waits: the namespace's quota is used up.",
    Reason.WAITING_FOR_ADMISSION: "Kubernetes, waits: a queue, the namespace or another Pod of its name is in its way.",
    Reason.WAITING_FOR_NODE: "Kubernetes, waits: its node does not get its Pod ready; `kubectl describe pod` says why.",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount of each resource. cpu in milli-cores, memory and storage in bytes, gpu in milli-GPUs."""

    cpu: int
    memory: int
    storage: int
    gpu: int

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu + other.cpu,
            self.memory + other.memory,
            self.storage + other.storage,
            self.gpu + other.gpu,
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu - other.cpu,
            self.memory - other.memory,
            self.storage - other.storage,
            self.gpu - other.gpu,
        )

    def within(self, room: Resources) -> bool:
        """True when this amount is at most `room` in every resource (GPU devices are a matter of `gpu_shares`)."""
        return (
            self.cpu <= room.cpu
            and self.memory <= room.memory
            and self.storage <= room.storage
            and self.gpu <= room.gpu
        )


NOTHING = Resources(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A part of one GPU device of a worker: `milli` of 1000."""

    device: int
    milli: int


def gpu_free(devices: int, taken: Iterable[GpuShare]) -> list[int]:
    """Free milli-GPUs of each device 0 … devices-1 once `taken` is handed out."""
    free = [1000] * devices
    for share in taken:
        free[share.device] -= share.milli
    return free


def gpu_shares(milli: int, free: list[int]) -> tuple[GpuShare, ...] | None:
    """Choose devices for a request of `milli` milli-GPUs, or None where no packing fits.

    Whole GPUs take whole devices; a remaining fraction goes to the fullest device that still has room for it, so that
    untouched devices stay whole for those who need them. Two devices with half left do not fit a request of 1000.
    """
    whole, fraction = divmod(milli, 1000)
    untouched = [device for device, left in enumerate(free) if left == 1000]
    if len(untouched) < whole:
        return None
    shares = [GpuShare(device, 1000) for device in untouched[:whole]]
    if fraction:
        used = {share.device for share in shares}
        candidates = [(left, device) for device, left in enumerate(free) if left >= fraction and device not in used]
        if not candidates:
            return None
        shares.append(GpuShare(min(candidates)[1], fraction))
    return tuple(shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What a client wishes; never changes after the submit.

    `command`: a string runs as `/bin/sh -c`, a tuple as given, None leaves the image's own command.
    `timeout_seconds`: counted from the container's start; None is no limit.
    `max_retries`: further attempts after the first, whatever ended it; None means 1 after a lost worker, 0 after a failure.
    """

    user_id: str
    image: str
    command: str | tuple[str, ...] | None
    resources: Resources
    timeout_seconds: int | None = None
    max_retries: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A wish and what became of it. `version` grows by one with each stored change (0: not stored yet)."""

    task_id: str
    spec: TaskSpec
    status: TaskStatus
    created_at: int
    attempt: int = 0  # attempts placed so far; the current one where the task is pending or running
    cancel_requested: bool = False
    worker_id: str | None = None
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    message: str | None = None
    version: int = 0


def run_id(task_id: str, attempt: int) -> str:
    """The computed name of an attempt; also the name of its container."""
    return f"{task_id}-{attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One attempt of a task on one worker. It repeats what the worker needs, so that a worker reads nothing else.

    `stop_requested` is the controller's wish; the fields from `phase` on are the worker's report.
    """

    task_id: str
    attempt: int
    worker_id: str
    user_id: str
    image: str
    command: str | tuple[str, ...] | None
    resources: Resources
    gpus: tuple[GpuShare, ...] = ()
    timeout_seconds: int | None = None
    created_at: int = 0
    stop_requested: bool = False
    phase: RunPhase = RunPhase.ASSIGNED
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    message: str | None = None
    version: int = 0

    @property
    def run_id(self) -> str:
        return run_id(self.task_id, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A machine that runs containers. `identity` tells the machine's agent from another one that claims its name.

    `ready` is False while its container engine does not answer; `problem` then says why.
    `cpu_usage` and `memory_usage` are percentages of the machine, None until reported. `lease` is what its agent was promised
    when it joined, in ms: for so long it may be unheard of and have containers, the grace of their stop included; 0
    where that has no end, or is not known. `silent`: whether it is unheard of, where the store judges that itself.
    """

    worker_id: str
    identity: str
    address: str  # host:port of the agent's health and metrics endpoint
    capacity: Resources
    runtime: str  # "docker" or "process"
    registered_at: int
    last_heartbeat: int
    ready: bool = True
    problem: str | None = None
    cpu_usage: float | None = None
    memory_usage: float | None = None
    lease: int = 0
    silent: bool | None = None

    @property
    def gpu_devices(self) -> int:
        return self.capacity.gpu // 1000

    def active(self, now: int, heartbeat_ms: int) -> bool:
        """Heard of and able to start containers."""
        return self.ready and self.heard(now, heartbeat_ms)

    def heard(self, now: int, heartbeat_ms: int) -> bool:
        """Heard of within three heartbeat intervals, unless its store knows better, whatever it can do."""
        if self.silent is not None:
            return not self.silent
        return now - self.last_heartbeat <= 3 * heartbeat_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A worker with what its live runs hold, read in one snapshot.

    Nothing is placed beyond the capacity; only a worker that comes back with less than it had may hold more than it has.
    """

    worker: Worker
    allocated: Resources
    runs: int
    gpu_free: tuple[int, ...] = ()  # free milli-GPUs of each device

    @property
    def available(self) -> Resources:
        return self.worker.capacity - self.allocated
