"""What is known of the Tasks and Pods of a namespace: told by events, repaired by lists, asked for where memory may lag.

Events are kopf's, and its watches may fall silent. So every few minutes what is live is listed and compared: what no event
told of is made good, and where events stay away for good the process ends, since a new one hears again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from cloudai.errors import CloudAIError
from cloudai.resources import TaskStatus
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import attempt_of, over, owner_of
from cloudai.store.kube.task_resource import ATTEMPT_LABEL, PHASES, TASK_LABEL, Json, tasks_path
from cloudai.store.kube.watch import ODD
from cloudai_controller.kube.state import Memory

REPAIR_SECONDS = 300.0
DEAF_SECONDS = 30.0  # how much later than a list an event may come
LIST_AGAIN_SECONDS = 2.0
LIVE_TASKS = ",".join(f"status.phase!={PHASES[status]}" for status in TaskStatus if status.terminal)
LIVE_PODS = "status.phase!=Succeeded,status.phase!=Failed"

log = logging.getLogger("cloudai.operator")


class Over(Exception):
    """This process can no longer do its work, and says why; a new one starts with nothing in memory."""


class Facts:
    """`changed(name)` is called for each Task of which, or of whose Pods, something is new.

    `heard_at`: when the API server last told anything, by this process's own clock (s).
    """

    def __init__(self, api: Api, namespace: str, changed: Callable[[str], None]) -> None:
        self._api = api
        self._changed = changed
        self.memory = Memory()
        self._tasks_path = tasks_path(namespace)
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self.heard_at = self._task_told_at = self._pod_told_at = time.monotonic()

    # -- what is told

    def task_told(self, kind: str | None, resource: Json) -> None:
        """An event of a Task: DELETED, or anything else for what it is now."""
        self._task_told_at = self.heard_at = time.monotonic()
        name = resource["metadata"]["name"]
        if kind == "DELETED":
            changed = self.memory.drop_task(name, resource["metadata"]["uid"])
        else:
            changed = self.memory.put_task(resource)
        if changed:
            self._changed(name)

    def pod_told(self, kind: str | None, pod: Json) -> None:
        """An event of a Pod with our label, whoever wrote that there."""
        self._pod_told_at = self.heard_at = time.monotonic()
        attempt = attempt_of(pod)
        if attempt is None:
            return
        if kind == "DELETED":
            changed = self.memory.drop_pod(attempt[0], pod["metadata"]["name"], pod["metadata"]["uid"])
        else:
            changed = self.memory.put_pod(pod)
        if changed:
            self._changed(attempt[0])

    # -- lists

    async def list_all(self) -> None:
        """Everything there is, however long the API server does not give it."""
        self.heard_at = time.monotonic()
        while True:
            try:
                return await self._list_all()
            except (ApiError, CloudAIError) as error:
                log.warning("tasks and pods cannot be listed: %s", error)
            await asyncio.sleep(LIST_AGAIN_SECONDS)

    async def _list_all(self) -> None:
        with self.memory.listing():
            names, version, _ = await self._listed(self._tasks_path, self.memory.put_task, _task_name)
            for name in self.memory.only_tasks(names, version):
                self._changed(name)
            query = {"labelSelector": TASK_LABEL}
            names, version, _ = await self._listed(self._pods_path, self.memory.put_pod, _pods_task, **query)
            for name in self.memory.only_pods(names, version):
                self._changed(name)

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
                        self._changed(task(one))
                except ODD as error:
                    log.warning("%s is not understood and left out: %r", one["metadata"]["name"], error)
        self.heard_at = time.monotonic()
        return names, int(version), news

    async def keep(self) -> None:
        """For ever: make good, slowly, what no event told of. Raises Over where that is needed and events stay away."""
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            task_told_at, pod_told_at = self._task_told_at, self._pod_told_at
            try:
                with self.memory.listing():
                    tasks, pods = await self._review_tasks(), await self._review_pods()
            except (ApiError, CloudAIError) as error:
                log.warning("tasks and pods cannot be listed: %s", error)
                continue
            if tasks or pods:
                await asyncio.sleep(DEAF_SECONDS)
            if (tasks and self._task_told_at == task_told_at) or (pods and self._pod_told_at == pod_told_at):
                raise Over("events of the API server do not arrive any more")

    async def _review_tasks(self) -> int:
        """Look at what is live, here or there; returns how much of it was news. What has ended costs nothing."""
        names, version, news = await self._listed(
            self._tasks_path, self.memory.put_task, _task_name, fieldSelector=LIVE_TASKS
        )
        for name, seen in list(self.memory.tasks.items()):
            if seen.finished_at is None and seen.version <= version and name not in names:
                news += 1
                if await self.fetched_task(name) is None:
                    self.memory.drop_task(name, seen.uid)
                self._changed(name)
        return news

    async def _review_pods(self) -> int:
        query = {"labelSelector": TASK_LABEL, "fieldSelector": LIVE_PODS}
        names, version, news = await self._listed(self._pods_path, self.memory.put_pod, _pods_task, **query)
        for task, pods in list(self.memory.pods.items()):
            for name, pod in list(pods.items()):
                if not pod.run.phase.terminal and pod.version <= version and name not in names:
                    news += 1
                    if await self.fetched_pod(name) is None:
                        self.memory.drop_pod(task, name, pod.uid)
                    self._changed(task)
        return news

    # -- what is asked of the server itself

    async def fetched_pod(self, name: str) -> Json | None:
        """The Pod as it is now, taken in; None where there is none."""
        return await self._fetched(f"{self._pods_path}/{name}", self.memory.put_pod)

    async def fetched_task(self, name: str) -> Json | None:
        """The Task as it is now, taken in; None where there is none."""
        return await self._fetched(f"{self._tasks_path}/{name}", self.memory.put_task)

    async def _fetched(self, path: str, put: Callable[[Json], bool]) -> Json | None:
        try:
            found = await self._api.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        put(found)
        return found

    async def own_pod_is_there(self, name: str, owner: str) -> bool | None:
        """Whether the Pod of that name is that of the Task of that uid; None where there is none, or another's that is over.
        Raises ValueError for one that cannot be followed.
        """
        pod = await self.fetched_pod(name)
        if pod is None or owner_of(pod) != owner:
            return None if pod is None or over(pod) else False
        if attempt_of(pod) is None:
            raise ValueError(
                f"somebody took our labels from Pod {name}: {TASK_LABEL} and {ATTEMPT_LABEL} must be there"
            )
        return True

    async def pod_is_there(self, name: str, uid: str) -> bool:
        """Whether that very Pod is there."""
        pod = await self.fetched_pod(name)
        return pod is not None and pod["metadata"]["uid"] == uid

    async def task_is_there(self, name: str, uid: str) -> bool:
        """Whether the Task is there after all."""
        task = await self.fetched_task(name)
        if task is None or task["metadata"]["uid"] != uid:
            return False
        self._changed(name)
        return True


def _task_name(task: Json) -> str:
    return str(task["metadata"]["name"])


def _pods_task(pod: Json) -> str:
    attempt = attempt_of(pod)
    assert attempt is not None  # what is none was left out
    return attempt[0]
