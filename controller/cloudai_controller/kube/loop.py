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
from collections.abc import Callable, Coroutine
from dataclasses import replace

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.resources import PLACED_STATUSES, Reason, Run, Task, TaskStatus, run_id
from cloudai.settings import Settings
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.task_resource import (
    API_VERSION,
    KIND,
    Attempt,
    Json,
    attempts_of,
    status_of,
    task_of,
    tasks_path,
)
from cloudai_controller import metrics
from cloudai_controller.kube.archive import Archive
from cloudai_controller.kube.decide import Decision, decide, vanished
from cloudai_controller.kube.events import Events
from cloudai_controller.kube.facts import Facts
from cloudai_controller.kube.lease import Leader
from cloudai_controller.kube.pod import PodTerms, pod_of
from cloudai_controller.kube.refusal import Refused, refusal, taken, untaken
from cloudai_controller.kube.state import SeenPod, SeenTask
from cloudai_controller.kube.tidy import Tidying
from cloudai_controller.kube.workqueue import WorkQueue

WORKERS = 48
BUSY = 8  # so many at work at once are a burst: what follows an end waits until that is over
MAKERS = 32  # of these may wait for a Pod to be made: a webhook that hangs must not keep all from their work
# Seconds that a change which is no end is left alone: it is often overtaken by the next one, and then costs no write. The more
# tasks are on their way the longer, so that at most some 20 such writes a second take what starts and ends need.
SETTLE, SETTLE_EACH, LONGEST_SETTLE = 1.0, 0.05, 30.0
# Until a Pod that was not admitted is tried again: the more wait, the longer, so that at most 50 a second are.
REFUSED_SECONDS, REFUSED_EACH_SECONDS = 10.0, 0.02
ROOM_SECONDS = 1.0  # after an end, until the quota that refused another one's Pod counts it

log = logging.getLogger("cloudai.operator")


class Operator:
    """Follows the Tasks of one namespace and writes what becomes of them, while `leader` leads."""

    def __init__(self, api: Api, settings: Settings, leader: Leader) -> None:
        self._api = api.bound(before_write=leader.check)
        self._namespace = settings.namespace
        self._tasks_path = tasks_path(self._namespace)
        self._pods_path = f"/api/v1/namespaces/{self._namespace}/pods"
        self._terms = _terms(settings)
        self._image_grace = round(settings.image_grace_seconds * 1000)
        self._retention_ms = settings.task_retention_seconds * 1000
        self._archive = Archive(self._api, self._namespace, lambda pod: self._memory.knows(pod))
        self._events = Events(self._api, self._namespace)
        self._queue = WorkQueue(self._look)
        self.facts = Facts(self._api, self._namespace, self._changed, self._moved)
        self._memory = self.facts.memory
        self._tidying = Tidying(self._api, self._pods_path, self.facts, self._archive, self._is_busy, self._queue.add)
        metrics.LOOKS.set_function(lambda: len(self._queue))
        metrics.QUEUED.set_function(self._memory.queued)
        self._moved_at: dict[str, float] = {}  # tasks that came further and wait to be looked at, and since when (s)
        self._failing: dict[str, tuple[str, int]] = {}  # the attempt of a task that cannot start, and since when
        self._refused: dict[str, None] = {}  # tasks whose Pod was not admitted, in the order of that
        self._making = 0
        self._unmade: dict[str, None] = {}  # tasks that wait until fewer Pods are being made, in the order of that

    async def run(self, feed: Callable[[Facts], Coroutine[None, None, None]]) -> None:
        """Until cancelled. Starts with a list of everything, so that nothing is decided on half the facts; from then on
        `feed` tells what changes. Raises Over.
        """
        listed = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.facts.follow_pods(listed.set))
            await self.facts.list_tasks()
            await listed.wait()
            group.create_task(self._queue.run(WORKERS))
            group.create_task(self._tidying.run())
            group.create_task(self.facts.keep())
            group.create_task(feed(self.facts))

    def _is_busy(self) -> bool:
        return len(self._queue) + len(self._moved_at) > BUSY

    def _changed(self, name: str) -> None:
        if self._moved_at.pop(name, None) is not None:
            self._queue.forget(name)  # the look that it waits for comes now, and says when the next one is due
        self._queue.add(name)

    def _moved(self, name: str) -> None:
        self._moved_at.setdefault(name, time.monotonic())
        self._queue.add_after(name, self._settle())

    def _settle(self) -> float:
        """Seconds that a task is left alone after it came further."""
        return min(LONGEST_SETTLE, max(SETTLE, SETTLE_EACH * len(self._moved_at)))

    # -- one look

    async def _look(self, name: str) -> float | None:
        """Everything a Task needs now; returns the seconds until it needs a look though nothing changes."""
        try:
            unsettled = self._settle() - (time.monotonic() - self._moved_at.get(name, float("-inf")))
            if unsettled > 0:
                return unsettled
            self._moved_at.pop(name, None)
            self._unmade.pop(name, None)
            return await self._reconcile(name)
        finally:
            if self._unmade and self._making < MAKERS:
                first = next(iter(self._unmade))
                del self._unmade[first]
                self._queue.add(first)

    async def _reconcile(self, name: str) -> float | None:
        seen, known = self._memory.tasks.get(name), self._memory.pods_of(name)
        pods = {pod_name: pod for pod_name, pod in known.items() if seen is not None and pod.owner == seen.uid}
        if len(pods) < len(known):
            await self._abandon(name, {pod_name: pod for pod_name, pod in known.items() if pod_name not in pods})
        self._refused.pop(name, None)
        if seen is None:
            self._failing.pop(name, None)
            self._queue.forget(name)
            return None
        over = seen.finished_at is not None and all(pod.run.phase.terminal for pod in pods.values())
        if over and seen.edited:
            return await self._notice_edit(seen.resource())
        if over or seen.document is None:
            self._failing.pop(name, None)
            return await self._finished(name, seen, pods)
        resource, now = seen.resource(), now_ms()
        task, ended = _wished(resource), attempts_of(resource.get("status") or {})
        runs = {pod_name: pod.run for pod_name, pod in pods.items()}
        current = run_id(name, task.attempt)
        if task.status in PLACED_STATUSES and current not in runs:
            own = await self.facts.own_pod_is_there(current, seen.uid)
            if own:
                return 0.0
            if own is False:  # it may be this one's, which somebody took its owner from
                return await self._wait_for_pod(resource, Decision(task, tuple(ended)), taken(current))
            runs[current] = vanished(task)
        coming = run_id(name, max(1, task.attempt + (task.status is TaskStatus.QUEUED)))
        if task.cancel_requested and coming not in runs and await self.facts.own_pod_is_there(coming, seen.uid):
            return 0.0  # made although nobody was told so: it is ended first
        failing, since = self._failing.get(name, ("", now))
        with metrics.PLAN_SECONDS.time():
            decision = decide(task, ended, runs, now, self._image_grace, since if failing == coming else None)
        if decision.failing and failing != coming:
            self._failing[name] = (coming, now)
        if _differs(task, decision.task):
            resource = await self._write_status(resource, decision.task, decision.ended, now)
            metrics.LOST.inc(sum(one.reason == Reason.WORKER_LOST for one in decision.ended[len(ended) :]))
        if decision.task.status.terminal:
            return await self._finished(name, self._memory.tasks.get(name), pods)
        self._tend(name, decision, pods)
        for run in decision.delete:
            await self._delete(run, pods)
        if decision.create is not None:
            return await self._create_pod(resource, decision)
        return None if decision.look_at is None else max(0.05, (decision.look_at - now) / 1000)

    def _tend(self, name: str, decision: Decision, pods: dict[str, SeenPod]) -> None:
        """See to the Pods of attempts that are told of in the status, and to the logs of those that are being ended."""
        done = {run_id(name, one.attempt) for one in decision.ended}
        for pod_name, pod in pods.items():
            if pod.run.phase.terminal and pod.held and pod_name in done:
                self._tidying.add(name, pod_name)
            elif pod.deleting and not pod.run.phase.terminal:
                self._archive.follow(pod)

    async def _finished(self, name: str, seen: SeenTask | None, pods: dict[str, SeenPod]) -> float | None:
        """Nothing is decided any more: a Pod that lives, or is heard of only now, is stopped, and one that is over seen to. The
        Task goes when its time is over, and its Pods with it.
        """
        if seen is None or seen.finished_at is None:
            return None
        for pod_name, pod in pods.items():
            if not pod.run.phase.terminal:
                await self._delete(pod.run, pods)
            elif pod.held:
                self._tidying.add(name, pod_name)
        left = seen.finished_at + self._retention_ms - now_ms()
        if left > 0:
            if not any(pod.held or not pod.run.phase.terminal for pod in pods.values()):
                self._memory.settle(name)
            return None if left == float("inf") else left / 1000
        try:
            await self._api.delete(f"{self._tasks_path}/{name}", uid=seen.uid)
        except ApiError as error:
            if error.status not in (404, 409) or await self.facts.task_is_there(name, seen.uid):
                raise
            self._memory.drop_task(name, seen.uid)
        return None

    async def _abandon(self, name: str, pods: dict[str, SeenPod]) -> None:
        """Pods of a Task that was deleted, though another one of its name may be there: stopped, and nothing kept."""
        for pod_name, pod in pods.items():
            over = pod.run.phase.terminal
            if not pod.held if over else pod.deleting:
                continue
            if await self.facts.task_is_there(name, pod.owner):
                return
            if over:
                await self._tidying.release(pod_name, pod)
            else:
                await self._delete(pod.run, pods)

    # -- what is written

    async def _write_status(self, resource: Json, task: Task, ended: tuple[Attempt, ...], now: int) -> Json:
        meta = resource["metadata"]
        status = status_of(task, ended, resource.get("status") or {}, meta.get("generation", 1), now)
        stored = await self._put_status(meta, status)
        metrics.ACTIONS.labels(action=task.status.value).inc()
        self._events.status(resource, task)
        if task.status.terminal:
            self._let_try()
        return stored

    async def _notice_edit(self, resource: Json) -> float:
        """An edit after the end changes nothing; `kubectl wait` believes a status only once it is of the newest wish."""
        await self._put_status(
            resource["metadata"], resource["status"] | {"observedGeneration": resource["metadata"]["generation"]}
        )
        return 0.0

    async def _put_status(self, meta: Json, status: Json) -> Json:
        known = {name: meta[name] for name in ("name", "namespace", "uid", "resourceVersion")}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": known, "status": status}
        try:
            stored = await self._api.replace(f"{self._tasks_path}/{meta['name']}/status", body)
        except ApiError as error:
            if error.status in (404, 409) and await self.facts.fetched_task(meta["name"]) is None:
                self._memory.drop_task(meta["name"], meta["uid"])
            raise
        self._memory.put_task(stored)
        return stored

    def _let_try(self) -> None:
        """There may be room for one whose Pod was not admitted."""
        if self._refused:
            first = next(iter(self._refused))
            del self._refused[first]
            self._queue.add_after(first, ROOM_SECONDS)

    async def _delete(self, run: Run, pods: dict[str, SeenPod]) -> None:
        pod = pods[run.run_id]
        if pod.deleting:
            return
        self._archive.follow(pod)
        try:
            await self._api.delete(f"{self._pods_path}/{run.run_id}", uid=pod.uid)
        except ApiError as error:
            if error.status not in (404, 409) or await self.facts.pod_is_there(run.run_id, pod.uid):
                raise
            self._memory.drop_pod(run.task_id, run.run_id, pod.uid)

    async def _create_pod(self, resource: Json, decision: Decision) -> float | None:
        if self._making >= MAKERS:
            self._unmade[decision.task.task_id] = None
            return None
        assert decision.create is not None
        name = run_id(decision.task.task_id, decision.create)
        self._making += 1
        try:
            pod = await self._api.create(self._pods_path, pod_of(resource, decision.task, decision.create, self._terms))
        except ApiError as error:
            if error.already_exists:
                if await self.facts.own_pod_is_there(name, resource["metadata"]["uid"]):
                    return 0.0
                return await self._wait_for_pod(resource, decision, taken(name))
            refused = refusal(error.status, error.message)
            if refused is None:
                raise
            return await self._wait_for_pod(resource, decision, refused)
        except CloudAIError as error:
            return await self._wait_for_pod(resource, decision, untaken(str(error)))
        finally:
            self._making -= 1
        self._memory.put_pod(pod)
        metrics.PLACEMENTS.inc()
        return None

    async def _wait_for_pod(self, resource: Json, decision: Decision, refused: Refused) -> float | None:
        now, task = now_ms(), task_of(resource)
        told = replace(decision.task, reason=refused.reason, message=refused.message)
        if refused.final:
            told = replace(told, status=TaskStatus.FAILED, finished_at=now)
        if _differs(task, told):
            await self._write_status(resource, told, decision.ended, now)
        if refused.final:
            return 0.0
        self._refused[task.task_id] = None
        return REFUSED_SECONDS + REFUSED_EACH_SECONDS * len(self._refused)


def _terms(settings: Settings) -> PodTerms:
    """A grace of at least a second: with none, Kubernetes calls a Pod gone while its container may still live."""
    grace = max(1, math.ceil(settings.stop_grace_seconds))
    return PodTerms(grace, settings.gpu_resource, settings.task_run_as_user)


def _wished(resource: Json) -> Task:
    """The Task; one that is deleted, and kept by somebody's finalizer, is to be cancelled."""
    task = task_of(resource)
    return replace(task, cancel_requested=True) if resource["metadata"].get("deletionTimestamp") else task


def _differs(before: Task, after: Task) -> bool:
    """Whether the change is worth a write: other words for the same reason are not."""
    if after.status is TaskStatus.QUEUED and after.reason == Reason.WAITING_FOR_CAPACITY:
        after = replace(after, reason=before.reason)
    return before != replace(after, message=before.message)
