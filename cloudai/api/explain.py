"""Why a task does not go on, in words: a pure function of the wish, the workers and the time.

Nothing of it is stored: it is computed when somebody asks, so it is never out of date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloudai.resources import GIB, Reason, Resources, Task, TaskStatus, Worker, WorkerState, gpu_shares

NAMED = 4  # workers named in one message; the rest are counted


@dataclass(frozen=True, slots=True)
class Waiting:
    reason: Reason
    message: str


def explain_wish(wish: Resources, workers: Sequence[WorkerState], now: int, heartbeat_ms: int) -> Waiting:
    """What keeps a queued task with this wish from its start."""
    active = [state for state in workers if state.worker.active(now, heartbeat_ms)]
    if not active:
        return Waiting(Reason.NO_WORKERS, _nobody(workers))
    if not any(_fits_whole(wish, state) for state in active):
        return Waiting(Reason.TOO_LARGE, _too_large(wish, active))
    shortfalls = [(_shortfall(wish, state), state) for state in active if _fits_whole(wish, state)]
    room = [state.worker.worker_id for short, state in shortfalls if not short]
    if room:
        text = f"{room[0]} has room: the task starts there at the next turn, unless an older task waits for that room."
        return Waiting(Reason.WAITING_FOR_CAPACITY, text)
    nearest = sorted(shortfalls, key=lambda pair: (len(pair[0]), pair[1].worker.worker_id))
    named = "; ".join(
        f"{state.worker.worker_id} lacks {' and '.join(short)} ({_held_by(state.runs)} room there)"
        for short, state in nearest[:NAMED]
    )
    return Waiting(Reason.WAITING_FOR_CAPACITY, f"Waits for room: {named}{_others(len(nearest))}.")


def explain_no_controller(task: Task, problem: str) -> Waiting:
    """`problem`: why nothing is decided about any task."""
    if task.status is TaskStatus.QUEUED:
        then = after_the_last(task, "The task starts once a controller is at work")
    elif task.cancel_requested:
        then = "The task is stopped, and its end told, once a controller is at work"
    else:
        then = "What runs goes on, and its end is told once a controller is at work"
    return Waiting(Reason.NO_CONTROLLER, f"{then}: {problem}.")


def explain_inactive(task: Task, worker: Worker, now: int, heartbeat_ms: int, lease_seconds: float) -> Waiting:
    """What is uncertain of `task`, which was given to `worker`, and that is not active."""
    heard = f"was last heard of {max(0, now - worker.last_heartbeat) // 1000} s ago"
    problem = "" if worker.ready else f" and said: {_said(worker)}"
    if task.cancel_requested:
        here = "The task is stopped there once the worker is back."
    elif task.status is TaskStatus.RUNNING:
        here = "What runs there goes on as far as anybody can know."
    else:
        here = "The task goes on there once the worker is back."
    if worker.heard(now, heartbeat_ms) or lease_seconds == float("inf"):  # only its engine is away, or nothing follows
        later = ""
    else:
        seconds = max(lease_seconds, worker.lease / 1000)
        later = f" If it stays away for longer than {seconds:g} s, this attempt counts as lost."
    return Waiting(Reason.WORKER_INACTIVE, f"Worker {worker.worker_id} {heard}{problem}. {here}{later}")


def after_the_last(task: Task, words: str) -> str:
    """Behind what a queued task says of the end of its last attempt."""
    return f"{task.message} {words}" if task.message else words


def _held_by(tasks: int) -> str:
    return "1 task holds" if tasks == 1 else f"{tasks} tasks hold"


def _nobody(known: Sequence[WorkerState]) -> str:
    if known:
        named = "; ".join(f"{state.worker.worker_id} {_why_inactive(state.worker)}" for state in known[:NAMED])
        return f"No worker is active: {named}{_others(len(known))}."
    return "No worker has joined: start an agent with `cloudai agent`."


def _said(worker: Worker) -> str:
    """In the middle of a sentence."""
    return (worker.problem or "it is not ready").rstrip(".")


def _why_inactive(worker: Worker) -> str:
    return "has not been heard of lately" if worker.ready else f"says: {_said(worker)}"


def _fits_whole(wish: Resources, state: WorkerState) -> bool:
    """Whether the worker could hold the wish if nothing else ran there."""
    return wish.within(state.worker.capacity)


def _too_large(wish: Resources, active: Sequence[WorkerState]) -> str:
    near = sorted(active, key=lambda state: (len(_over(wish, state.worker.capacity)), state.worker.worker_id))
    named = "; ".join(
        f"{state.worker.worker_id} is too small by {' and '.join(_over(wish, state.worker.capacity))}"
        for state in near[:NAMED]
    )
    return f"It asks for more than any worker has: {named}{_others(len(near))}. It starts when a larger worker joins."


def _shortfall(wish: Resources, state: WorkerState) -> list[str]:
    """What is short now, each with its amount; empty when the task would fit."""
    short = _over(wish, state.available)
    if wish.gpu and wish.gpu <= state.available.gpu and gpu_shares(wish.gpu, list(state.gpu_free)) is None:
        short.append(f"a GPU device with enough left in one piece for {wish.gpu / 1000:g}")
    return short


def _over(wish: Resources, room: Resources) -> list[str]:
    lacks = wish - room
    words = []
    if lacks.cpu > 0:
        words.append(f"{lacks.cpu / 1000:g} CPU")
    if lacks.memory > 0:
        words.append(f"{lacks.memory / GIB:.3g} GiB memory")
    if lacks.storage > 0:
        words.append(f"{lacks.storage / GIB:.3g} GiB storage")
    if lacks.gpu > 0:
        words.append(f"{lacks.gpu / 1000:g} GPU")
    return words


def _others(count: int) -> str:
    return f"; and {count - NAMED} more" if count > NAMED else ""
