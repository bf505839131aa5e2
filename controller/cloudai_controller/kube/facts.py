"""What is known of the Tasks and Pods of a namespace: told by events, repaired by lists, asked for where memory may lag.

Events of Tasks are kopf's, and its watches may fall silent. So every few minutes what is live is listed and compared: what no
event told of is made good, and where events stay away for good the process ends, since a new one hears again. Pods change
more than twice as often, and what kopf does for each event costs more than all that is done here: they have a watch of ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set

from cloudai.errors import CloudAIError
from cloudai.resources import TaskStatus
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import attempt_of, over, owner_of
from cloudai.store.kube.task_resource import ATTEMPT_LABEL, PHASES, TASK_LABEL, Json, tasks_path
from cloudai.store.kube.watch import ODD, Key, follow
from cloudai_controller import metrics
from cloudai_controller.kube.state import Memory

REPAIR_SECONDS = 300.0
DEAF_SECONDS = 30.0  # how much later than a list an event may come
LIST_AGAIN_SECONDS = 2.0
LIVE_TASKS = ",".join(f"status.phase!={PHASES[status]}" for status in TaskStatus if status.terminal)

log = logging.getLogger("cloudai.operator")


class Over(Exception):
    """This process can no longer do its work, and says why; a new one starts with nothing in memory."""


class Facts:
    """`changed(name)` is called for each Task of which, or of whose Pods, something is new; `moved(name)` where a Pod only came
    further on its way.

    `heard_at`: when the API server last told anything, by this process's own clock (s).
    """

    def __init__(self, api: Api, namespace: str, changed: Callable[[str], None], moved: Callable[[str], None]) -> None:
        self._api = api
        self._changed = changed
        self._moved = moved
        self.memory = Memory()
        self._tasks_path = tasks_path(namespace)
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self.heard_at = self._task_told_at = time.monotonic()
        self.trouble = ""  # why Tasks could not be listed when that was tried last

    # -- what is told

    def task_told(self, kind: str | None, resource: Json) -> None:
        """An event of a Task: DELETED, or anything else for what it is now."""
        self._task_told_at = self.heard_at = time.monotonic()
        name = resource["metadata"]["name"]
        if kind == "DELETED":
            changed = self.memory.drop_task(
                name, resource["metadata"]["uid"], int(resource["metadata"]["resourceVersion"])
            )
        else:
            changed = self.memory.put_task(resource)
        if changed:
            self._changed(name)

    # -- Pods: a follower of their watch

    async def follow_pods(self, listed: Callable[[], None]) -> None:
        """For ever; calls `listed` after each whole list."""
        await follow(self._api, self._pods_path, self, listed, labelSelector=TASK_LABEL)

    def changed(self, resource: Json) -> None:
        """A Pod with our label, whoever wrote that there."""
        self.heard_at = time.monotonic()
        attempt = attempt_of(resource)
        if attempt is None:
            self._unlabelled(resource)
        elif self.memory.put_pod(resource):
            pod = self.memory.pods[attempt[0]][resource["metadata"]["name"]]
            ends = pod.run.phase.terminal or pod.deleting
            (self._changed if ends else self._moved)(attempt[0])

    def _unlabelled(self, resource: Json) -> None:
        """Somebody changed the labels of what may be ours: whoever asks for it by name puts them back."""
        meta = resource["metadata"]
        task, version = meta["name"].rpartition("-")[0], int(meta["resourceVersion"])
        if self.memory.drop_pod(task, meta["name"], meta["uid"], version):
            self._changed(task)

    def deleted(self, resource: Json) -> None:
        """The Pod is gone, or has no label of ours any more."""
        self.heard_at = time.monotonic()
        attempt, meta = attempt_of(resource), resource["metadata"]
        version = int(meta["resourceVersion"])
        if attempt is not None and self.memory.drop_pod(attempt[0], meta["name"], meta["uid"], version):
            self._changed(attempt[0])

    def only(self, keys: Set[Key], version: int) -> None:
        """At `version` there were these and no others."""
        self.heard_at = time.monotonic()
        for name in self.memory.only_pods({name for _, name in keys}, version):
            self._changed(name)

    # -- lists of Tasks

    async def list_tasks(self) -> None:
        """Every Task there is, however long the API server does not give it."""
        self.heard_at = time.monotonic()
        while True:
            try:
                names, version, _ = await self._listed()
                for name in self.memory.only_tasks(names, version):
                    self._changed(name)
                return
            except (ApiError, CloudAIError) as error:
                self._not_listed(error)
            await asyncio.sleep(LIST_AGAIN_SECONDS)

    def _not_listed(self, error: Exception) -> None:
        metrics.ERRORS.inc()
        if str(error) != self.trouble:
            log.warning("tasks cannot be listed: %s", error)
        self.trouble = str(error)

    async def _listed(self, **query: str) -> tuple[set[str], int, int]:
        """Take in what there is; returns all names, the list's version and how many were news."""
        names: set[str] = set()
        version, news = "0", 0
        async for page, listed in self._api.pages(self._tasks_path, **query):
            version = listed
            for one in page:
                name = one["metadata"]["name"]
                names.add(name)
                try:
                    if self.memory.put_task(one):
                        news += 1
                        self._changed(name)
                except ODD as error:
                    log.warning("%s is not understood and left out: %r", name, error)
        self.heard_at, self.trouble = time.monotonic(), ""
        return names, int(version), news

    async def keep(self) -> None:
        """For ever: make good, slowly, what no event told of. Raises Over where that is needed and events stay away."""
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            told_at = self._task_told_at
            try:
                news = await self._review()
            except (ApiError, CloudAIError) as error:
                self._not_listed(error)
                continue
            if news:
                await asyncio.sleep(DEAF_SECONDS)
            if news and self._task_told_at == told_at:
                raise Over("events of the API server do not arrive any more")

    async def _review(self) -> int:
        """Look at what is live, here or there; returns how much of it was news. What has ended costs nothing."""
        names, version, news = await self._listed(fieldSelector=LIVE_TASKS)
        for name, seen in list(self.memory.tasks.items()):
            if seen.finished_at is None and seen.version <= version and name not in names:
                news += 1
                if await self.fetched_task(name) is None:
                    self.memory.drop_task(name, seen.uid)
                self._changed(name)
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
        Our labels are put back where somebody took them: without them nobody would be told of its end.
        """
        pod = await self.fetched_pod(name)
        if pod is None or owner_of(pod) != owner:
            return None if pod is None or over(pod) else False
        if attempt_of(pod) is None:
            task, _, number = name.rpartition("-")
            meta = {"resourceVersion": pod["metadata"]["resourceVersion"]}
            body = {"metadata": meta | {"labels": {TASK_LABEL: task, ATTEMPT_LABEL: number}}}
            self.memory.put_pod(await self._api.patch(f"{self._pods_path}/{name}", body))
            log.warning("somebody took our labels from Pod %s; they are there again", name)
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
