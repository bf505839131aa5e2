"""A scenario as text: what is stored, one thing a line, and below the line of dashes what every pass does about it.

now 1000                                            seconds; the start is 1000 where nothing is said
observing 990                                       since when the controller has watched without a gap
worker worker-1 cpu=4 memory=8 gpu=2 heard=960 unready
task task-1 running on=worker-1 attempt=1 cpu=1 memory=2 gpu=0.5 retries=2 cancel
run task-1-1 running on=worker-1 gpus=0:500 stop started=995 exit=1 reason=ExitCode message=Words_with_underscores
"""

from __future__ import annotations

from dataclasses import replace

from cloudai.resources import GIB, GpuShare, Resources, Run, RunPhase, Task, TaskSpec, TaskStatus, Worker
from cloudai_controller.actions import Action, Finish, LoseRun, MarkRunning, Note, Place, Requeue, StopRun
from cloudai_controller.state import Heard
from tests.controller.world import World

DASHES = "-" * 40


def played(text: str) -> str:
    """What the passes do until nothing is left to do, as text."""
    world = read(text)
    lines: list[str] = []
    for number in range(1, 10):
        actions = world.act()
        if not actions:
            held = world.view.hold
            rest = [f"{held.worker_id} is held for {held.task_id}"] if held else []
            return "\n".join([*lines, *rest, "at rest", ""])
        lines += [f"pass {number}", *(f"  {told(action)}" for action in actions)]
    raise AssertionError("planning does not come to rest")


def read(text: str) -> World:
    world = World(sound=False)
    world.now = 1_000_000
    observing = 0
    kept: list[list[str]] = []
    for line in filter(None, (line.partition("#")[0].split() for line in text.splitlines())):
        if line[0] == "now":
            world.now = int(line[1]) * 1000
        elif line[0] == "observing":
            observing = int(line[1]) * 1000
        else:
            kept.append(line)
    amounts: dict[str, Resources] = {}
    for kind, name, *words in kept:
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        flags = [word for word in words if "=" not in word]
        if kind == "worker":
            world.workers[name] = _worker(name, fields, flags, world.now)
        elif kind == "task":
            world.tasks[name] = _task(name, fields, flags)
            amounts[name] = _amounts(fields)
        else:
            assert kind == "run", kind
            task_id = name.rpartition("-")[0]
            world.runs[name] = _run(name, fields, flags, amounts.get(task_id, _amounts(fields)))
    world.heard = {name: worker.last_heartbeat for name, worker in world.workers.items()}
    world.view = world.read_anew(observing, {name: Heard(heard, heard) for name, heard in world.heard.items()})
    return world


def _amounts(fields: dict[str, str]) -> Resources:
    def milli(name: str, default: str) -> int:
        return round(float(fields.get(name, default)) * 1000)

    return Resources(milli("cpu", "1"), milli("memory", "1") * GIB // 1000, 0, milli("gpu", "0"))


def _worker(name: str, fields: dict[str, str], flags: list[str], now: int) -> Worker:
    heard = int(fields["heard"]) * 1000 if "heard" in fields else now
    return Worker(
        worker_id=name,
        identity="identity",
        address="10.0.0.1:50052",
        capacity=_amounts({"cpu": "4", "memory": "8", **fields}),
        runtime="docker",
        registered_at=0,
        last_heartbeat=heard,
        ready="unready" not in flags,
    )


def _task(name: str, fields: dict[str, str], flags: list[str]) -> Task:
    retries = int(fields["retries"]) if "retries" in fields else None
    spec = TaskSpec(user_id="ann", image="busybox", command="true", resources=_amounts(fields), max_retries=retries)
    return Task(
        task_id=name,
        spec=spec,
        status=TaskStatus(flags[0]),
        created_at=int(name.removeprefix("task-")),
        attempt=int(fields.get("attempt", 0)),
        cancel_requested="cancel" in flags,
        worker_id=fields.get("on"),
        version=1,
    )


def _run(name: str, fields: dict[str, str], flags: list[str], amounts: Resources) -> Run:
    task_id, _, attempt = name.rpartition("-")
    pairs = [pair.split(":") for pair in fields.get("gpus", "").split(",") if pair]
    message = fields.get("message")
    run = Run(
        task_id=task_id,
        attempt=int(attempt),
        worker_id=fields["on"],
        user_id="ann",
        image="busybox",
        command="true",
        resources=amounts,
        gpus=tuple(GpuShare(int(device), int(milli)) for device, milli in pairs),
        stop_requested="stop" in flags,
        phase=RunPhase(flags[0]),
        version=1,
    )
    return replace(
        run,
        started_at=int(fields["started"]) * 1000 if "started" in fields else None,
        exit_code=int(fields["exit"]) if "exit" in fields else None,
        reason=fields.get("reason"),
        message=message and message.replace("_", " "),
    )


def told(action: Action) -> str:
    match action:
        case Place(task, worker_id, gpus):
            devices = ", ".join(f"{share.milli} of device {share.device}" for share in gpus)
            return f"place {task.task_id} attempt {action.attempt} on {worker_id}" + (
                f" with {devices}" if gpus else ""
            )
        case MarkRunning(task, started_at):
            return f"mark {task.task_id} running since {started_at // 1000}"
        case Note(task, reason, message):
            return f"note on {task.task_id}: {reason} {message}"
        case Requeue(task, reason, message):
            return f"queue {task.task_id} again, {reason}: {message}"
        case Finish(task, status):
            why = f", {action.reason}: {action.message}" if action.reason else ""
            code = "" if action.exit_code is None else f" with exit code {action.exit_code}"
            return f"finish {task.task_id} {status}{code}{why}"
        case StopRun(run, why):
            return f"stop {run.run_id}, {why}"
        case LoseRun(run, _, reason, message):
            return f"lose {run.run_id}, {reason}: {message}"
