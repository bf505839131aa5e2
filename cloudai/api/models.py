"""The bodies and queries of the API. The same models validate requests and make the OpenAPI document.

Limits are written so that JSON Schema can say them: a generated client knows what the server will refuse.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from cloudai.resources import TaskStatus

MAX_CPU = 100_000.0  # cores
MAX_GIB = 1_048_576.0
MAX_GPU = 1024.0
MIN_MEMORY = 6 / 1024  # GiB; Docker starts nothing with less
MAX_COMMAND = 32_000  # characters; Linux takes no argument longer than 128 KiB, and a character may have four bytes
MAX_COUNT = 2**53 - 1  # largest whole number that every JSON reader keeps

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
# Docker's reference grammar: [domain[:port]/]path[:tag][@digest]
IMAGE = rf"^(?:{_DOMAIN}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@{_DIGEST})?$"
# No control characters, no blank at either end.
USER = r"^[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$"
NO_NUL = r"^[^\x00]*$"

UserId = Annotated[str, Field(min_length=1, max_length=256, pattern=USER)]
Image = Annotated[str, Field(min_length=1, max_length=512, pattern=IMAGE)]
Argument = Annotated[str, Field(max_length=MAX_COMMAND, pattern=NO_NUL)]


def _bounded(arguments: list[str]) -> list[str]:
    """A list is no way around the bound of a string."""
    if sum(map(len, arguments)) > MAX_COMMAND:
        raise PydanticCustomError("command_too_long", f"must have at most {MAX_COMMAND} characters in all")
    return arguments


Arguments = Annotated[list[Argument], Field(max_length=1000), AfterValidator(_bounded)]
Command = Argument | Arguments | None


def _integer(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TaskRequest(BaseModel):
    """A wish: which image to run, what in it, and how much it may use."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: UserId = Field(description="Who asks; what the caller says is believed.", examples=["user-123"])
    docker_image: Image = Field(
        description="An image reference of Docker's grammar.", examples=["docker.io/library/ubuntu:latest"]
    )
    command: Command = Field(
        None,
        description="A string runs as `/bin/sh -c`; a list, of as many characters in all, runs as given; absent or empty "
        "leaves the image's own command.",
        examples=["echo 'Hello World'"],
    )
    req_cpu: float = Field(ge=0.001, le=MAX_CPU, allow_inf_nan=False, description="Cores.", examples=[1.0])
    req_memory: float = Field(ge=MIN_MEMORY, le=MAX_GIB, allow_inf_nan=False, description="GiB; at least 6 MiB.")
    req_storage: float = Field(0.0, ge=0, le=MAX_GIB, allow_inf_nan=False, description="GiB; 0 is not limited.")
    req_gpu: float = Field(0.0, ge=0, le=MAX_GPU, allow_inf_nan=False, description="GPUs; 0.5 is half of one.")
    timeout_seconds: Annotated[int, Field(ge=1, le=315_360_000), BeforeValidator(_integer)] | None = Field(
        None, description="Longest run, counted from its start; null is no limit."
    )
    max_retries: Annotated[int, Field(ge=0, le=100), BeforeValidator(_integer)] | None = Field(
        None, description="Further attempts; null is 1 after a lost worker and 0 after a failure."
    )


# ---- queries


def _whole(value: Any) -> Any:
    """Digits as a number; anything else stays what it is, and is refused."""
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) <= 20:
        return int(value)
    return value


def _switch(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


Offset = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_whole)]
Switch = Annotated[bool, BeforeValidator(_switch)]


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NoQuery(Query):
    """No parameters."""


class ListQuery(Query):
    status: TaskStatus | None = Field(None, strict=False, description="Those with this status.")
    user_id: UserId | None = Field(None, description="Those of this user.")
    limit: Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)] = Field(
        50, description="Most tasks in the answer."
    )
    offset: Offset = Field(0, description="How many to skip, newest first.")
    view: Literal["summary", "full"] = Field("summary", description="`full` gives every field of each task.")


class TaskGetQuery(Query):
    wait_seconds: Annotated[int, Field(ge=0, le=60), BeforeValidator(_whole)] = Field(
        0, description="Hold the answer until the task has ended, or so many seconds."
    )
    version: Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_whole)] | None = Field(
        None, description="With wait_seconds: answer as soon as the task's version is another one."
    )


class LogQuery(Query):
    offset: Offset = Field(0, description="First byte wanted.")
    limit: Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(_whole)] | None = Field(
        None, description="Most bytes; all there are when absent."
    )
    follow: Switch = Field(False, description="Go on until the attempt has ended.")
    attempt: Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(_whole)] | None = Field(
        None, description="Which attempt; the latest when absent."
    )


# ---- answers


class Answer(BaseModel):
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class Submitted(Answer):
    task_id: str = Field(examples=["task-1731753000123456789"])
    status: TaskStatus
    message: str


class TaskSummary(Answer):
    task_id: str
    user_id: str
    status: TaskStatus
    created_at: str = Field(examples=["2025-11-16T10:30:00Z"])
    worker_id: str | None = Field(description="Null until placed.")


class TaskView(TaskSummary):
    """A task: the wish and what became of it. A field without a value yet is null."""

    docker_image: str
    command: str | list[str] | None
    req_cpu: float
    req_memory: float
    req_storage: float
    req_gpu: float
    timeout_seconds: int | None
    max_retries: int | None
    started_at: str | None = Field(description="When the container of the current attempt started.")
    finished_at: str | None
    exit_code: int | None
    reason: str | None = Field(description="Why it waits or ended, for programs; docs/errors.md lists them.")
    message: str | None = Field(description="The same for people.")
    attempt: int = Field(description="Attempts placed so far.")
    cancel_requested: bool
    created_at_ms: int = Field(description="Milliseconds since the Unix epoch, as the two below.")
    started_at_ms: int | None
    finished_at_ms: int | None
    version: int = Field(description="Grows with each change.")


class TaskList(Answer):
    tasks: list[TaskView | TaskSummary] = Field(description="Newest first.")
    total: int = Field(description="How many match in all.")
    limit: int
    offset: int


class WorkerView(Answer):
    worker_id: str
    worker_ip: str = Field(examples=["192.168.1.100:50052"])
    total_cpu: float
    total_memory: float
    total_storage: float
    total_gpu: float
    allocated_cpu: float
    allocated_memory: float
    allocated_storage: float
    allocated_gpu: float
    available_cpu: float
    available_memory: float
    available_storage: float
    available_gpu: float
    is_active: bool = Field(description="Heard of lately and able to start containers.")
    last_heartbeat: int = Field(description="Unix seconds.")
    registered_at: str
    runtime: str = Field(description="`docker`, or `process` for no isolation at all.")
    problem: str | None = Field(description="Why it cannot start containers now.")
    cpu_usage: float | None = Field(description="Percent of the machine.")
    memory_usage: float | None
    running: int = Field(description="How many tasks hold room on it.")


class WorkerList(Answer):
    workers: list[WorkerView]


class RunningTask(Answer):
    task_id: str
    user_id: str
    started_at: str


class WorkerDetails(WorkerView):
    running_tasks: list[RunningTask] = Field(description="Those whose container has started.")


class ClusterStatus(Answer):
    """Totals of all workers; what is available counts active workers only."""

    total_workers: int
    active_workers: int
    total_cpu: float
    total_memory: float
    total_storage: float
    total_gpu: float
    available_cpu: float
    available_memory: float
    available_storage: float
    available_gpu: float
    total_tasks: int
    running_tasks: int
    queued_tasks: int
    completed_tasks: int
    pending_tasks: int
    failed_tasks: int
    cancelled_tasks: int


class ErrorBody(Answer):
    code: str
    message: str
    details: dict[str, Any]


class ErrorAnswer(Answer):
    """Every error has this form."""

    error: ErrorBody


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    ready: bool
    checks: dict[str, str] = Field(description="`ok`, or what is wrong, for the store and the controller.")
