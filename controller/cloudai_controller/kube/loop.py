"""The operator's work: look at a Task when something about it changed, decide, write what follows.

A key comes from an event, from the time, or from the slow list that repairs what no event told. Each write compares
versions or has a computed name, and is made only while this process leads; what it gives back is known at once, so the
next look is never behind this process's own writes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from cloudai.errors import CloudAIError
from cloudai.resources import Reason, Run, Task, TaskStatus, run_id
from cloudai.settings import Settings
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import FINALIZER, attempt_of, owner_of
from cloudai.store.kube.task_resource import (
    ATTEMPT_LABEL,
    GROUP,
    PHASES,
    TASK_LABEL,
    VERSION,
    Attempt,
    Json,
    attempts_of,
    status_of,
    task_of,
    tasks_path,
)
from cloudai.store.kube.watch import ODD
from cloudai_controller import metrics
from cloudai_controller.kube.archive import Archive
from cloudai_controller.kube.decide import Decision, decide, vanished
from cloudai_controller.kube.events import Events
from cloudai_controller.kube.lease import Leader, NotLeading
from cloudai_controller.kube.pod import PodTerms, pod_of
from cloudai_controller.kube.refusal import Refused, refusal, taken
from cloudai_controller.kube.state import Memory, SeenPod, SeenTask
from cloudai_controller.kube.workqueue import WorkQueue

WORKERS = 32
TIDIERS = 4
# A task that has not ended is written when it has stayed as it is for so long (ms): with many under way longer, so that at
# most some 50 such writes a second take what the ends of tasks need.
SETTLE_MS, LONGEST_SETTLE_MS, SETTLE_EACH_MS = 400, 5000, 20
TIDY_PATIENCE_MS = 60_000  # an end may wait so long to be tidied up after, while others wait to be told of
REPAIR_SECONDS = 300.0
DEAF_SECONDS = 30.0  # how much later than a list an event may come
LIVE_TASKS = ",".join(f"status.phase!={PHASES[status]}" for status in TaskStatus if status.terminal)
LIVE_PODS = "status.phase!=Succeeded,status.phase!=Failed"
LOG_PATIENCE_MS = 300_000  # how long a log is tried to be read after its end, of a node that does not answer
REFUSED_SECONDS = 10.0  # until a Pod that was not admitted is tried again

log = logging.getLogger("cloudai.operator")


class Over(Exception):
    """This process can no longer do its work, and says why; a new one starts with nothing in memory."""


class Operator:
    """Follows the Tasks of one namespace and writes what becomes of them, while `leader` leads.

    `heard_at`: when the API server last told anything, by this process's own clock (s).
    """

    def __init__(self, api: Api, settings: Settings, leader: Leader) -> None:
        self._api = api.bound(before_write=leader.check)
        self._namespace = settings.namespace
        self._tasks_path = tasks_path(self._namespace)
        self._pods_path = f"/api/v1/namespaces/{self._namespace}/pods"
        self._terms = _terms(settings)
        self._image_grace = round(settings.image_grace_seconds * 1000)
        self._retention_ms = settings.task_retention_seconds * 1000
        self._archive = Archive(self._api, self._namespace)
        self._events = Events(self._api, self._namespace)
        self._memory = Memory()
        self._queue = WorkQueue(self._look, _failed)
        self._tidying = WorkQueue(self._tidy, _failed)
        metrics.LOOKS.set_function(lambda: len(self._queue))
        self._moved_at: dict[str, int] = {}  # since when a task is due to be written
        self._failing: dict[str, int] = {}  # by attempt: since when its Pod cannot start
        self._unread: dict[str, int] = {}  # by attempt: since when its log cannot be read
        self._told_at = self.heard_at = time.monotonic()

    # -- what is told

    def task_told(self, kind: str | None, resource: Json) -> None:
        """An event of a Task: DELETED, or anything else for what it is now."""
        self._told_at = self.heard_at = time.monotonic()
        name = resource["metadata"]["name"]
        if kind == "DELETED":
            changed = self._memory.drop_task(name, resource["metadata"]["uid"])
        else:
            changed = self._memory.put_task(resource)
        if changed:
            self._queue.add(name)

    def pod_told(self, kind: str | None, pod: Json) -> None:
        """An event of a Pod with our label, whoever wrote that there."""
        self._told_at = self.heard_at = time.monotonic()
        attempt = attempt_of(pod)
        if attempt is None:
            return
        if kind == "DELETED":
            changed = self._memory.drop_pod(attempt[0], pod["metadata"]["name"], pod["metadata"]["uid"])
        else:
            changed = self._memory.put_pod(pod)
        if changed:
            self._queue.add(attempt[0])

    # -- for ever

    async def run(self) -> None:
        """Until cancelled. Starts with a list of everything, so that nothing is decided on half the facts. Raises Over."""
        self.heard_at = time.monotonic()
        await self._list_all()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run(WORKERS))
            group.create_task(self._tidying.run(TIDIERS))
            group.create_task(self._repair())

    async def _list_all(self) -> None:
        with self._memory.listing():
            names, version, _ = await self._listed(self._tasks_path, self._memory.put_task, _task_name)
            for name in self._memory.only_tasks(names, version):
                self._queue.add(name)
            query = {"labelSelector": TASK_LABEL}
            names, version, _ = await self._listed(self._pods_path, self._memory.put_pod, _pods_task, **query)
            for name in self._memory.only_pods(names, version):
                self._queue.add(name)

    async def _listed(
        self, path: str, put: Callable[[Json], bool], task: Callable[[Json], str], **query: str
    ) -> tuple[set[str], int, int]:
        """Take in what there is; returns all names, the list's version and how many were news."""
        names: set[str] = set()
        version, news = "0", 0
        async for page, listed in self._api.pages(path, **query):
            version = listed
            for one in page:
                names.add(one["metadata"]["name"])
                try:
                    if put(one):
                        news += 1
                        self._queue.add(task(one))
                except ODD as error:
                    log.warning("%s is not understood and left out: %r", one["metadata"]["name"], error)
        self.heard_at = time.monotonic()
        return names, int(version), news

    async def _repair(self) -> None:
        """Make good what no event told of, slowly; where that is needed and events stay away, a new process is."""
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            told_at = self._told_at
            try:
                news = await self._review()
            except (ApiError, CloudAIError) as error:
                log.warning("tasks and pods cannot be listed: %s", error)
                continue
            if news:
                await asyncio.sleep(DEAF_SECONDS)
                if self._told_at == told_at:
                    raise Over("events of the API server do not arrive any more")

    async def _review(self) -> int:
        """Look at what is live, here or there; returns how much of it was news. What has ended costs nothing."""
        with self._memory.listing():
            names, version, news = await self._listed(
                self._tasks_path, self._memory.put_task, _task_name, fieldSelector=LIVE_TASKS
            )
            for name, seen in list(self._memory.tasks.items()):
                if seen.finished_at is None and seen.version <= version and name not in names:
                    news += 1
                    if await self._fetched_task(name) is None:
                        self._memory.drop_task(name, seen.uid)
                    self._queue.add(name)
            query = {"labelSelector": TASK_LABEL, "fieldSelector": LIVE_PODS}
            names, version, more = await self._listed(self._pods_path, self._memory.put_pod, _pods_task, **query)
            for task, pods in list(self._memory.pods.items()):
                for name, pod in list(pods.items()):
                    if not pod.run.phase.terminal and pod.version <= version and name not in names:
                        more += 1
                        if await self._fetched_pod(name) is None:
                            self._memory.drop_pod(task, name, pod.uid)
                        self._queue.add(task)
        return news + more

    # -- one look

    async def _look(self, name: str) -> float | None:
        """Everything a Task needs now; returns the seconds until it needs a look though nothing changes."""
        seen, known = self._memory.tasks.get(name), self._memory.pods_of(name)
        pods = {pod_name: pod for pod_name, pod in known.items() if seen is not None and pod.owner == seen.uid}
        if len(pods) < len(known):
            await self._abandon(name, {pod_name: pod for pod_name, pod in known.items() if pod_name not in pods})
        if seen is None:
            self._moved_at.pop(name, None)
            return None
        if seen.document is None:
            return await self._finished(name, seen, pods)
        resource, now = seen.resource(), _now()
        task, ended = task_of(resource), attempts_of(resource.get("status") or {})
        runs = {pod_name: pod.run for pod_name, pod in pods.items()}
        current = run_id(name, task.attempt)
        if task.status in (TaskStatus.PENDING, TaskStatus.RUNNING) and current not in runs:
            if await self._own_pod_is_there(current, seen.uid):
                return 0.0
            runs[current] = vanished(task)
        coming = run_id(name, max(1, task.attempt + (task.status is TaskStatus.QUEUED)))
        decision = decide(task, ended, runs, now, self._image_grace, self._failing.get(coming))
        self._note_failing(coming, decision, now)
        wait = self._unsettled(name, task, decision, now)
        if wait is not None:
            return wait
        if _differs(task, decision.task):
            resource = await self._write_status(resource, decision.task, decision.ended, now)
            if decision.task.status.terminal:
                self._queue.add(name)
        for run in decision.delete:
            await self._delete(run, pods)
        self._tend(name, decision, pods)
        if decision.create is not None and resource["metadata"].get("deletionTimestamp") is None:
            return await self._create_pod(resource, decision)
        if decision.task.status.terminal and not decision.delete:
            return await self._finished(name, self._memory.tasks.get(name), pods)
        return None if decision.look_at is None else max(0.05, (decision.look_at - now) / 1000)

    def _note_failing(self, attempt: str, decision: Decision, now: int) -> None:
        if decision.look_at is not None:
            self._failing.setdefault(attempt, now)
        elif decision.task.started_at is not None or decision.task.status.terminal:
            self._failing.pop(attempt, None)

    def _unsettled(self, name: str, task: Task, decision: Decision, now: int) -> float | None:
        """Seconds to wait before a change that is not an end is written: it is often overtaken by the next one."""
        lasting = decision.task.status.terminal or decision.delete or decision.create is not None
        if lasting or not _differs(task, decision.task):
            self._moved_at.pop(name, None)
            return None
        settle = min(LONGEST_SETTLE_MS, max(SETTLE_MS, SETTLE_EACH_MS * len(self._moved_at)))
        due = self._moved_at.setdefault(name, now) + settle
        if now < due:
            return (due - now) / 1000
        del self._moved_at[name]
        return None

    def _tend(self, name: str, decision: Decision, pods: dict[str, SeenPod]) -> None:
        """See to the Pods of attempts that are told of in the status, and to the logs of those that are being ended."""
        done = {run_id(name, one.attempt) for one in decision.ended}
        for pod_name, pod in pods.items():
            if pod.run.phase.terminal and pod.held and (pod_name in done or decision.task.status.terminal):
                self._tidying.add(f"{name}/{pod_name}")
            elif pod.deleting and not pod.run.phase.terminal:
                self._archive.follow(pod.run)

    async def _finished(self, name: str, seen: SeenTask | None, pods: dict[str, SeenPod]) -> float | None:
        """Nothing is decided any more; the Task goes when its time is over, and its Pods with it."""
        if seen is None or seen.finished_at is None:
            return None
        for pod_name, pod in pods.items():
            if pod.run.phase.terminal and pod.held:
                self._tidying.add(f"{name}/{pod_name}")
        left = seen.finished_at + self._retention_ms - _now()
        if left > 0:
            if not any(pod.held or not pod.run.phase.terminal for pod in pods.values()):
                self._memory.settle(name)
            return None if left == float("inf") else left / 1000
        try:
            await self._api.delete(f"{self._tasks_path}/{name}", uid=seen.uid)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            self._memory.drop_task(name, seen.uid)
        return None

    async def _abandon(self, name: str, pods: dict[str, SeenPod]) -> None:
        """Pods of a Task that was deleted, though another one of its name may be there: stopped, and nothing kept."""
        for pod_name, pod in pods.items():
            over = pod.run.phase.terminal
            if not pod.held if over else pod.deleting:
                continue
            if await self._task_is_there(name, pod.owner):
                return
            if over:
                await self._release(pod_name, pod)
                self._archive.forget(pod_name)
            else:
                await self._delete(pod.run, pods)

    # -- what is written

    async def _write_status(self, resource: Json, task: Task, ended: tuple[Attempt, ...], now: int) -> Json:
        meta = resource["metadata"]
        status = status_of(task, ended, resource.get("status") or {}, meta.get("generation", 1), now)
        body = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": status}
        stored = await self._api.patch(f"{self._tasks_path}/{meta['name']}/status", body)
        self._memory.put_task(stored)
        metrics.ACTIONS.labels(action=task.status.value).inc()
        self._events.status(resource, task)
        return stored

    async def _delete(self, run: Run, pods: dict[str, SeenPod]) -> None:
        pod = pods[run.run_id]
        if pod.deleting:
            return
        self._archive.follow(pod.run)
        try:
            await self._api.delete(f"{self._pods_path}/{run.run_id}", uid=pod.uid)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            if await self._fetched_pod(run.run_id) is None:
                self._memory.drop_pod(run.task_id, run.run_id, pod.uid)

    async def _create_pod(self, resource: Json, decision: Decision) -> float | None:
        task, attempt = decision.task, decision.create
        assert attempt is not None
        name = run_id(task.task_id, attempt)
        try:
            pod = await self._api.create(self._pods_path, pod_of(resource, task, attempt, self._terms))
        except ApiError as error:
            if error.status == 409 and error.reason == "AlreadyExists":
                if await self._own_pod_is_there(name, resource["metadata"]["uid"]):
                    return 0.0
                return await self._refused(resource, decision, taken(name))
            refused = refusal(error.status, error.message)
            if refused is None:
                raise
            return await self._refused(resource, decision, refused)
        self._memory.put_pod(pod)
        metrics.PLACEMENTS.inc()
        return None

    async def _refused(self, resource: Json, decision: Decision, refused: Refused) -> float | None:
        now = _now()
        told = replace(decision.task, reason=refused.reason, message=refused.message)
        if refused.final:
            told = replace(told, status=TaskStatus.FAILED, finished_at=now)
        if _differs(task_of(resource), told):
            await self._write_status(resource, told, decision.ended, now)
        return None if refused.final else REFUSED_SECONDS

    async def _release(self, pod_name: str, pod: SeenPod) -> None:
        """Let Kubernetes remove the Pod when it likes."""
        if not pod.held:
            return
        left = [one for one in pod.finalizers if one != FINALIZER]
        body = {"metadata": {"resourceVersion": str(pod.version), "finalizers": left or None}}
        try:
            self._memory.put_pod(await self._api.patch(f"{self._pods_path}/{pod_name}", body))
        except ApiError as error:
            if error.status == 404:
                self._memory.drop_pod(pod.run.task_id, pod_name, pod.uid)
            elif error.status == 409:
                await self._fetched_pod(pod_name)
                raise
            else:
                raise

    async def _tidy(self, key: str) -> float | None:
        """Keep the log of an attempt that has ended and whose end is in the status; then its Pod may go."""
        name, _, pod_name = key.partition("/")
        pod, seen = self._memory.pods_of(name).get(pod_name), self._memory.tasks.get(name)
        if pod is None or not pod.held or not pod.run.phase.terminal:
            return None
        waits = len(self._queue) + len(self._moved_at) > WORKERS and not pod.deleting
        if waits and _now() - (pod.run.finished_at or pod.run.created_at) < TIDY_PATIENCE_MS:
            return 0.5
        if seen is not None and seen.uid == pod.owner:
            owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "Task", "name": name, "uid": seen.uid}
            try:
                await self._archive.keep(pod.run, owner)
            except (ApiError, CloudAIError) as error:
                if _now() - self._unread.setdefault(key, _now()) < LOG_PATIENCE_MS:
                    raise
                log.warning("the log of %s is lost: %s", pod_name, error)
            self._unread.pop(key, None)
        await self._release(pod_name, pod)
        self._queue.add(name)
        return None

    # -- what is asked of the server itself, where the memory may lag

    async def _fetched_pod(self, name: str) -> Json | None:
        return await self._fetched(f"{self._pods_path}/{name}", self._memory.put_pod)

    async def _fetched_task(self, name: str) -> Json | None:
        return await self._fetched(f"{self._tasks_path}/{name}", self._memory.put_task)

    async def _fetched(self, path: str, put: Callable[[Json], bool]) -> Json | None:
        """The object as it is now, taken in; None where there is none."""
        try:
            found = await self._api.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        put(found)
        return found

    async def _own_pod_is_there(self, name: str, owner: str) -> bool:
        """Whether the Task of that uid has a Pod of that name. Raises ValueError for one that cannot be followed."""
        pod = await self._fetched_pod(name)
        if pod is None or owner_of(pod) != owner:
            return False
        if attempt_of(pod) is None:
            raise ValueError(
                f"somebody took our labels from Pod {name}: {TASK_LABEL} and {ATTEMPT_LABEL} must be there"
            )
        return True

    async def _task_is_there(self, name: str, uid: str) -> bool:
        task = await self._fetched_task(name)
        if task is None or task["metadata"]["uid"] != uid:
            return False
        self._queue.add(name)
        return True


def _terms(settings: Settings) -> PodTerms:
    """A grace of at least a second: with none, Kubernetes calls a Pod gone while its container may still live."""
    grace = max(1, math.ceil(settings.stop_grace_seconds))
    return PodTerms(grace, settings.gpu_resource, settings.task_run_as_user)


def _task_name(task: Json) -> str:
    return str(task["metadata"]["name"])


def _pods_task(pod: Json) -> str:
    attempt = attempt_of(pod)
    assert attempt is not None  # what is none was left out
    return attempt[0]


def _differs(before: Task, after: Task) -> bool:
    """Whether the change is worth a write: other words for the same reason are not."""
    if after.status is TaskStatus.QUEUED and after.reason == Reason.WAITING_FOR_CAPACITY:
        after = replace(after, reason=before.reason)
    return replace(before, message=None) != replace(after, message=None)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _failed(key: str, error: Exception, failures: int) -> None:
    """A conflict or an absent object is a look at old facts; the rest is told the first time."""
    metrics.ERRORS.inc()
    passing = isinstance(error, NotLeading | CloudAIError) or (
        isinstance(error, ApiError) and error.status in (404, 409)
    )
    if passing:
        log.debug("%s: %s", key, error)
    elif failures in (1, 5):
        log.warning("%s failed and is tried again: %s", key, error, exc_info=not isinstance(error, ApiError))
