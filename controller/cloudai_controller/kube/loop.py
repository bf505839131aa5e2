"""The operator's work: look at a Task when something about it changed, decide, write what follows.

A key comes from an event, from the time, or from the slow list that repairs what no event told. Each write compares
versions or has a computed name, and is made only while this process leads; what it gives back is known at once, so the
next look is never behind this process's own writes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import aiohttp

from cloudai.errors import CloudAIError
from cloudai.resources import Reason, Run, Task, TaskStatus, run_id
from cloudai.settings import Settings
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import FINALIZER
from cloudai.store.kube.task_resource import (
    GROUP,
    PLURAL,
    TASK_LABEL,
    VERSION,
    Attempt,
    attempts_of,
    status_of,
    task_of,
)
from cloudai_controller import metrics
from cloudai_controller.kube.archive import Archive
from cloudai_controller.kube.decide import Decision, decide, vanished
from cloudai_controller.kube.events import Events
from cloudai_controller.kube.lease import Leader
from cloudai_controller.kube.pod import PodTerms, pod_of
from cloudai_controller.kube.refusal import Refused, refusal
from cloudai_controller.kube.state import Memory, SeenPod, SeenTask
from cloudai_controller.kube.workqueue import WorkQueue

WORKERS = 32
TIDIERS = 4
SETTLE_MS = 400  # a task that has not ended is written when it has stayed as it is for so long
RELIST_SECONDS = 300.0
LOG_PATIENCE_MS = 300_000  # how long a log is tried to be read after its end, of a node that does not answer
REFUSED_SECONDS = 10.0  # until a Pod that was not admitted is tried again

Json = dict[str, Any]
log = logging.getLogger("cloudai.operator")


class NotLeading(Exception):
    """The lease is over; whatever is left is another operator's business."""


class Operator:
    def __init__(self, api: Api, settings: Settings, leader: Leader) -> None:
        self._api = api
        self._leader = leader
        self._namespace = settings.namespace
        self._tasks_path = f"/apis/{GROUP}/{VERSION}/namespaces/{self._namespace}/{PLURAL}"
        self._pods_path = f"/api/v1/namespaces/{self._namespace}/pods"
        self._terms = PodTerms(round(settings.stop_grace_seconds), settings.gpu_resource)
        self._image_grace = round(settings.image_grace_seconds * 1000)
        self._retention_ms = settings.task_retention_seconds * 1000
        self._archive = Archive(api, self._namespace)
        self._events = Events(api, self._namespace)
        self._memory = Memory()
        self._queue = WorkQueue(self._look, _failed)
        self._tidying = WorkQueue(self._tidy, _failed)
        self._moved_at: dict[str, int] = {}  # since when a task is due to be written
        self.told_at = time.monotonic()

    # -- what is told

    def task_told(self, kind: str | None, resource: Json) -> None:
        """An event of a Task: DELETED, or anything else for what it is now."""
        self.told_at = time.monotonic()
        name = resource["metadata"]["name"]
        if kind == "DELETED":
            changed = self._memory.drop_task(name, resource["metadata"]["uid"])
        else:
            changed = self._memory.put_task(resource)
        if changed:
            self._queue.add(name)

    def pod_told(self, kind: str | None, pod: Json) -> None:
        self.told_at = time.monotonic()
        task = pod["metadata"]["labels"][TASK_LABEL]
        if kind == "DELETED":
            changed = self._memory.drop_pod(task, pod["metadata"]["name"], pod["metadata"]["uid"])
        else:
            changed = self._memory.put_pod(pod)
        if changed:
            self._queue.add(task)

    # -- for ever

    async def run(self) -> None:
        """Until cancelled. Starts with a list of everything, so that nothing is decided on half the facts."""
        self.told_at = time.monotonic()
        await self.relist()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run(WORKERS))
            group.create_task(self._tidying.run(TIDIERS))
            group.create_task(self._repair())

    async def relist(self) -> None:
        tasks, _ = await self._api.list_all(self._tasks_path)
        pods, _ = await self._api.list_all(self._pods_path, labelSelector=TASK_LABEL)
        self.told_at = time.monotonic()
        for name in self._memory.listed_tasks(tasks) | self._memory.listed_pods(pods):
            self._queue.add(name)

    async def _repair(self) -> None:
        while True:
            await asyncio.sleep(RELIST_SECONDS)
            try:
                await self.relist()
            except (ApiError, CloudAIError) as error:
                log.warning("tasks and pods cannot be listed: %s", error)

    # -- one look

    async def _look(self, name: str) -> float | None:
        """Everything a Task needs now; returns the seconds until it needs a look though nothing changes."""
        seen, pods = self._memory.tasks.get(name), self._memory.pods_of(name)
        if seen is None:
            return await self._without_task(name, pods)
        if seen.document is None:
            return await self._finished(name, seen, pods)
        resource, now = seen.resource(), _now()
        task, ended = task_of(resource), attempts_of(resource.get("status") or {})
        runs = {pod_name: pod.run for pod_name, pod in pods.items()}
        current = run_id(name, task.attempt)
        if task.status in (TaskStatus.PENDING, TaskStatus.RUNNING) and current not in runs:
            if await self._pod_is_there(current):
                return 0.0
            runs[current] = vanished(task)
        decision = decide(task, ended, runs, now, self._image_grace)
        wait = self._unsettled(name, task, decision, now)
        if wait is not None:
            return wait
        if _differs(task, decision.task):
            resource = await self._write_status(resource, decision.task, decision.ended, now)
            if decision.task.status.terminal:
                self._queue.add(name)
        for run in decision.delete:
            await self._delete(run, pods)
        if decision.create is not None and resource["metadata"].get("deletionTimestamp") is None:
            return await self._create_pod(resource, decision)
        self._tend(name, decision, pods)
        if decision.task.status.terminal and not decision.delete:
            return await self._finished(name, self._memory.tasks.get(name), self._memory.pods_of(name))
        return None if decision.look_at is None else max(0.05, (decision.look_at - now) / 1000)

    def _unsettled(self, name: str, task: Task, decision: Decision, now: int) -> float | None:
        """Seconds to wait before a change that is not an end is written: it is often overtaken by the next one."""
        lasting = decision.task.status.terminal or decision.delete or decision.create is not None
        if lasting or not _differs(task, decision.task):
            self._moved_at.pop(name, None)
            return None
        due = self._moved_at.setdefault(name, now) + SETTLE_MS
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
        self._check_lead()
        try:
            await self._api.delete(f"{self._tasks_path}/{name}", uid=seen.uid)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
        return None

    async def _without_task(self, name: str, pods: dict[str, SeenPod]) -> float | None:
        """The Task was deleted: its Pods are stopped and nothing of them is kept."""
        self._moved_at.pop(name, None)
        for pod_name, pod in pods.items():
            if pod.run.phase.terminal:
                await self._release(pod_name, pod)
                self._archive.forget(pod_name)
            elif not pod.deleting and not await self._task_is_there(name):
                await self._delete(pod.run, pods)
        return None

    # -- what is written

    def _check_lead(self) -> None:
        if not self._leader.leads():
            raise NotLeading

    async def _write_status(self, resource: Json, task: Task, ended: tuple[Attempt, ...], now: int) -> Json:
        self._check_lead()
        meta = resource["metadata"]
        status = status_of(task, ended, resource.get("status") or {}, meta.get("generation", 1), now)
        body = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": status}
        stored = await self._api.patch(f"{self._tasks_path}/{meta['name']}/status", body)
        self._memory.put_task(stored)
        metrics.ACTIONS.labels(action=task.status.value).inc()
        self._events.status(resource, task)
        return stored

    async def _delete(self, run: Run, pods: dict[str, SeenPod]) -> None:
        self._check_lead()
        pod = pods[run.run_id]
        if pod.deleting:
            return
        self._archive.follow(pod.run)
        try:
            await self._api.delete(f"{self._pods_path}/{run.run_id}", uid=pod.uid)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            await self._learn_pod(run.run_id)

    async def _create_pod(self, resource: Json, decision: Decision) -> float | None:
        self._check_lead()
        task, attempt = decision.task, decision.create
        assert attempt is not None
        try:
            pod = await self._api.create(self._pods_path, pod_of(resource, task, attempt, self._terms))
        except ApiError as error:
            if error.status == 409 and error.reason == "AlreadyExists":
                await self._learn_pod(run_id(task.task_id, attempt))
                return 0.0
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
        self._check_lead()
        left = [one for one in pod.finalizers if one != FINALIZER]
        body = {"metadata": {"resourceVersion": str(pod.version), "finalizers": left or None}}
        try:
            self._memory.put_pod(await self._api.patch(f"{self._pods_path}/{pod_name}", body))
        except ApiError as error:
            if error.status == 404:
                self._memory.drop_pod(pod.run.task_id, pod_name, pod.uid)
            elif error.status == 409:
                await self._learn_pod(pod_name)
                raise
            else:
                raise

    async def _tidy(self, key: str) -> float | None:
        """Keep the log of an attempt that has ended and whose end is in the status; then its Pod may go."""
        name, _, pod_name = key.partition("/")
        pod, seen = self._memory.pods_of(name).get(pod_name), self._memory.tasks.get(name)
        if pod is None or not pod.held or not pod.run.phase.terminal:
            return None
        if seen is not None:
            owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "Task", "name": name, "uid": seen.uid}
            try:
                await self._archive.keep(pod.run, owner)
            except (ApiError, CloudAIError, aiohttp.ClientError, OSError) as error:
                if _now() - (pod.run.finished_at or pod.run.created_at) < LOG_PATIENCE_MS:
                    raise
                log.warning("the log of %s is lost: %s", pod_name, error)
        await self._release(pod_name, pod)
        self._queue.add(name)
        return None

    # -- what is asked of the server itself, where the memory may lag

    async def _learn_pod(self, pod_name: str) -> None:
        await self._pod_is_there(pod_name)

    async def _pod_is_there(self, pod_name: str) -> bool:
        try:
            self._memory.put_pod(await self._api.get(f"{self._pods_path}/{pod_name}"))
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def _task_is_there(self, name: str) -> bool:
        try:
            self._memory.put_task(await self._api.get(f"{self._tasks_path}/{name}"))
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        self._queue.add(name)
        return True


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
