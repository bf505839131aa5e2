"""What a run's container is made of, and what the engine's answer says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from docker.types import DeviceRequest

from cloudai.resources import Reason, Run
from cloudai.settings import Settings
from cloudai_agent.runtime import Container, ContainerState, Refusal, device_list, engine_says

CLUSTER, WORKER, TASK, ATTEMPT = "cloudai.cluster", "cloudai.worker", "cloudai.task", "cloudai.attempt"
LEAST_MEMORY = 6 * 1024 * 1024  # the engine refuses less
LEAST_CPU = 10  # milli-cores; the same
# Around each line of log the engine puts up to 75 bytes, so a log of empty lines takes 80 times its size on disk. Two files
# of half of that hold every byte that is ever shipped, unless a container writes as much again while the agent is away.
LOG_FILES, LOG_GROWTH = 2, 40


@dataclass(frozen=True, slots=True)
class Engine:
    """What is asked of an engine once. `exact_logs`: it has the log driver `local`, which keeps bytes as they are; in
    `json-file`, which every engine has, bytes that are not UTF-8 and letters cut by its buffer are replaced.
    """

    cores: int
    exact_logs: bool

    @staticmethod
    def of(info: Mapping[str, Any]) -> Engine:
        """From the engine's answer to `info`."""
        return Engine(info["NCPU"], "local" in ((info.get("Plugins") or {}).get("Log") or ()))

    def log_config(self, max_log_bytes: int) -> dict[str, Any]:
        size = {"max-size": str(max_log_bytes * LOG_GROWTH + 1024 * 1024), "max-file": str(LOG_FILES)}
        if self.exact_logs:
            return {"type": "local", "config": {**size, "compress": "false"}}
        return {"type": "json-file", "config": size}


_STATES = {
    "created": ContainerState.CREATED,
    "running": ContainerState.RUNNING,
    "paused": ContainerState.RUNNING,
    "restarting": ContainerState.RUNNING,
    "removing": ContainerState.EXITED,
    "exited": ContainerState.EXITED,
    "dead": ContainerState.EXITED,
}
# What an engine says that hung before it had anything to start, and of what one that was killed left behind.
_NEVER_MADE = re.compile(r"failed to create (shim )?task: .*context (deadline exceeded|canceled)")
_LEFT_BEHIND = re.compile(r"^task [0-9a-f]+: already exists")
_NO_COMMAND = re.compile(r"executable file not found|no such file or directory", re.IGNORECASE)


def container_config(
    api: Any, run: Run, settings: Settings, labels: Mapping[str, str], engine: Engine
) -> dict[str, Any]:
    """The engine's description of a run's container."""
    environment = {"CLOUDAI_TASK_ID": run.task_id, "CLOUDAI_ATTEMPT": str(run.attempt)}
    if run.gpus:
        environment["NVIDIA_VISIBLE_DEVICES"] = device_list(run.gpus)
    entrypoint: list[str] | None = None
    command: list[str] | None = None
    if isinstance(run.command, str):
        entrypoint, command = ["/bin/sh", "-c"], [run.command]
    elif run.command is not None:
        entrypoint, command = [run.command[0]], list(run.command[1:])
    return dict(
        api.create_container_config(
            run.image,
            command,
            entrypoint=entrypoint,
            environment=environment,
            hostname=run.run_id,
            labels={**labels, TASK: run.task_id, ATTEMPT: str(run.attempt)},
            host_config=_host_config(api, run, settings, engine),
        )
    )


def _host_config(api: Any, run: Run, settings: Settings, engine: Engine) -> dict[str, Any]:
    memory = max(run.resources.memory, LEAST_MEMORY)
    # The operator may offer more cores than there are; the engine refuses a limit above them.
    cpu = min(max(run.resources.cpu, LEAST_CPU), 1000 * engine.cores)
    gpus = [str(share.device) for share in run.gpus]
    options = {
        "nano_cpus": cpu * 1_000_000,
        "mem_limit": memory,
        "memswap_limit": memory,  # both together: no swap beyond the memory
        "pids_limit": settings.pids_limit,
        "init": True,
        "security_opt": ["no-new-privileges"],
        "cap_drop": [name.strip() for name in settings.cap_drop.split(",") if name.strip()],
        "network_mode": settings.network,
        "device_requests": [DeviceRequest(device_ids=gpus, capabilities=[["gpu"]])] if gpus else None,
        "log_config": engine.log_config(settings.max_log_bytes),
    }
    return dict(api.create_host_config(**{name: value for name, value in options.items() if value is not None}))


def container_of(found: dict[str, Any]) -> Container:
    """From the engine's answer to an inspect of one of ours."""
    state, labels = found["State"], found["Config"]["Labels"]
    ended = state["Status"] in ("exited", "dead", "removing")
    started_at, finished_at = milliseconds(state["StartedAt"]), milliseconds(state["FinishedAt"])
    refused = state["Error"] and started_at is None
    return Container(
        run_id=found["Name"].removeprefix("/"),
        task_id=labels[TASK],
        attempt=int(labels[ATTEMPT]),
        state=_STATES[state["Status"]],
        started_at=started_at,
        # The engine reads two clocks: a very short life may seem to end before it began.
        finished_at=max(finished_at or 0, started_at or 0) or None if ended else None,
        exit_code=state["ExitCode"] if ended else None,
        oom_killed=state["OOMKilled"],
        refusal=start_refusal(state["Error"]) if refused else None,
    )


def start_refusal(words: str) -> Refusal:
    """Why a start failed, from the engine's words: those of its answer, and those it keeps with the container."""
    if _NO_COMMAND.search(words):
        text = f"The image has no such command ({words}); check its spelling and what the image holds."
        return Refusal(Reason.COMMAND_NOT_FOUND, text)
    if _NEVER_MADE.search(words):
        text = f"The engine broke off before it could start the container ({words}); nothing of it has run."
        return Refusal(Reason.WORKER_LOST, text)
    if _LEFT_BEHIND.search(words):
        text = f"The engine was killed while it started the container ({words}); it may have run, so submit the task again."
        return Refusal(Reason.START_FAILED, text)
    if "device driver" in words:
        text = f"This worker's engine passes no GPUs on ({words}); install the NVIDIA Container Toolkit there."
        return Refusal(Reason.START_FAILED, text)
    return Refusal(Reason.START_FAILED, engine_says(words))


def milliseconds(text: str) -> int | None:
    """An engine's time, such as 2025-11-16T10:30:00.123456789Z; the year 1 means never."""
    if text.startswith("0001-"):
        return None
    whole, _, rest = text.rstrip("Z").partition(".")
    return round(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 1000 + int(f"{rest[:3]:0<3}")
