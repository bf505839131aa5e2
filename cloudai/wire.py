"""What an agent and the facade say to each other over one WebSocket (`/agents/connect`, `Authorization: Bearer <join token>`).

Text frames are JSON messages with a `type`. A binary frame carries log bytes: one line of JSON (LogHeader), `\\n`, the bytes.
The server always tells the wish whole enough to act on: after registering, every live run of the worker; later, the runs
that changed and the ids of those no longer wanted. Whoever loses the connection registers again and starts from the whole.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from cloudai.resources import MOST_GPUS, WORKER_NAME, GpuShare, Resources, Run, RunPhase
from cloudai.store.protocol import RunReport

PROTOCOL = 1
PATH = "/agents/connect"
MAX_FRAME = 1024 * 1024
LOG_CHUNK = 128 * 1024


Millis = Annotated[int, Field(ge=0, le=253_402_300_799_999)]  # since the epoch, to the end of the year 9999
Amount = Annotated[int, Field(le=2**53)]
# An engine's words are passed on as they are, but no database of text takes this character.
Words = Annotated[str, AfterValidator(lambda words: words.replace("\0", "\N{REPLACEMENT CHARACTER}"))]
LONGEST_PROBLEM = 1000  # characters
Problem = Annotated[Words, Field(max_length=LONGEST_PROBLEM)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- agent to server


class Greeting(BaseModel):
    """What every version's Register has."""

    type: Literal["register"]
    protocol: int


class Register(Message):
    """First message of a connection. `identity` is made once a machine and kept in the agent's data directory."""

    type: Literal["register"] = "register"
    protocol: int = PROTOCOL
    worker_id: Annotated[str, Field(pattern=WORKER_NAME)]
    identity: Annotated[Words, Field(min_length=8, max_length=64)]
    address: Annotated[Words, Field(max_length=255)]
    runtime: Literal["docker", "process"]
    cpu: Annotated[Amount, Field(gt=0)]  # milli-cores
    memory: Annotated[Amount, Field(gt=0)]  # bytes
    storage: Annotated[Amount, Field(ge=0)]  # bytes
    gpu: Annotated[int, Field(ge=0, le=1000 * MOST_GPUS, multiple_of=1000)]  # milli-GPUs
    ready: bool = True
    problem: Problem | None = None

    @property
    def capacity(self) -> Resources:
        return Resources(self.cpu, self.memory, self.storage, self.gpu)


class HeartbeatMessage(Message):
    """`sent_at`: the agent's own monotonic clock in seconds, given back in the acknowledgement."""

    type: Literal["heartbeat"] = "heartbeat"
    sent_at: Annotated[float, Field(allow_inf_nan=False)]
    ready: bool = True
    problem: Problem | None = None
    cpu_usage: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None
    memory_usage: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None


class Report(Message):
    """What became of a run; the answer is the stored run in a `runs` message, or its id in `gone`."""

    type: Literal["report"] = "report"
    task_id: str
    attempt: Annotated[int, Field(ge=1, lt=2**31)]
    phase: RunPhase
    started_at: Millis | None = None
    finished_at: Millis | None = None
    exit_code: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    reason: Annotated[Words | None, Field(max_length=64)] = None
    message: Annotated[Words | None, Field(max_length=2000)] = None

    def for_worker(self, worker_id: str) -> RunReport:
        return RunReport(worker_id=worker_id, **self.model_dump(exclude={"type"}))


class LogHeader(Message):
    run_id: str
    offset: Annotated[int, Field(ge=0)]


# ---- server to agent


class Registered(Message):
    """The answer to Register: the lease's terms, then the whole wish follows as a `runs` message with `full`."""

    type: Literal["registered"] = "registered"
    cluster_id: str
    heartbeat_seconds: float
    lease_seconds: float | None  # None: never
    stop_grace_seconds: float


class Refused(Message):
    """The agent may not serve (its name is another machine's, its protocol is too old); the connection ends."""

    type: Literal["refused"] = "refused"
    code: Literal["name_taken", "protocol"]
    message: str


class HeartbeatAck(Message):
    """Sent once the heartbeat is durable."""

    type: Literal["heartbeat_ack"] = "heartbeat_ack"
    sent_at: float


class RunMessage(Message):
    """A Run of resources.py, field for field."""

    task_id: str
    attempt: int
    worker_id: str
    user_id: str
    image: str
    command: str | tuple[str, ...] | None
    cpu: int
    memory: int
    storage: int
    gpu: int
    gpus: tuple[tuple[int, int], ...]
    timeout_seconds: int | None
    created_at: int
    stop_requested: bool
    phase: RunPhase
    started_at: int | None
    finished_at: int | None
    exit_code: int | None
    reason: str | None
    message: str | None
    version: int
    log_end: int | None = None  # bytes of log the server has; told when the wish is whole

    @classmethod
    def of(cls, run: Run, log_end: int | None = None) -> RunMessage:
        return cls(
            task_id=run.task_id,
            attempt=run.attempt,
            worker_id=run.worker_id,
            user_id=run.user_id,
            image=run.image,
            command=run.command,
            cpu=run.resources.cpu,
            memory=run.resources.memory,
            storage=run.resources.storage,
            gpu=run.resources.gpu,
            gpus=tuple((share.device, share.milli) for share in run.gpus),
            timeout_seconds=run.timeout_seconds,
            created_at=run.created_at,
            stop_requested=run.stop_requested,
            phase=run.phase,
            started_at=run.started_at,
            finished_at=run.finished_at,
            exit_code=run.exit_code,
            reason=run.reason,
            message=run.message,
            version=run.version,
            log_end=log_end,
        )

    def run(self) -> Run:
        return Run(
            task_id=self.task_id,
            attempt=self.attempt,
            worker_id=self.worker_id,
            user_id=self.user_id,
            image=self.image,
            command=self.command,
            resources=Resources(self.cpu, self.memory, self.storage, self.gpu),
            gpus=tuple(GpuShare(device, milli) for device, milli in self.gpus),
            timeout_seconds=self.timeout_seconds,
            created_at=self.created_at,
            stop_requested=self.stop_requested,
            phase=self.phase,
            started_at=self.started_at,
            finished_at=self.finished_at,
            exit_code=self.exit_code,
            reason=self.reason,
            message=self.message,
            version=self.version,
        )


class Runs(Message):
    """The wish: `full` replaces all the agent knew; otherwise `runs` changed and `gone` are wanted no more."""

    type: Literal["runs"] = "runs"
    full: bool = False
    runs: tuple[RunMessage, ...] = ()
    gone: tuple[str, ...] = ()


class LogAck(Message):
    """The first `end` bytes of the attempt's log are durable; `end` below what was sent asks for a resend from there."""

    type: Literal["log_ack"] = "log_ack"
    run_id: str
    end: int


FromAgent = Annotated[Register | HeartbeatMessage | Report, Field(discriminator="type")]
FromServer = Annotated[Registered | Refused | HeartbeatAck | Runs | LogAck, Field(discriminator="type")]
from_agent: TypeAdapter[Register | HeartbeatMessage | Report] = TypeAdapter(FromAgent)
from_server: TypeAdapter[Registered | Refused | HeartbeatAck | Runs | LogAck] = TypeAdapter(FromServer)


def encode(message: Message) -> str:
    return message.model_dump_json()


def encode_log(run_id: str, offset: int, data: bytes) -> bytes:
    return LogHeader(run_id=run_id, offset=offset).model_dump_json().encode() + b"\n" + data


def decode_log(frame: bytes) -> tuple[LogHeader, bytes]:
    """Raises ValueError (pydantic's included) for a frame without a proper header line."""
    header, separator, data = frame.partition(b"\n")
    if not separator:
        raise ValueError("a log frame needs a header line")
    return LogHeader.model_validate_json(header), data
