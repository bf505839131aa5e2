"""After an end has been told of: its log is kept, then its Pod is let go."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.resources import Reason
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import FINALIZER
from cloudai.store.kube.task_resource import API_VERSION, KIND
from cloudai_controller.kube.archive import Archive
from cloudai_controller.kube.facts import Facts
from cloudai_controller.kube.state import SeenPod
from cloudai_controller.kube.workqueue import WorkQueue

TIDIERS = 8
A_NODE = 4  # of these at most read from the same node: one that does not answer must not keep all others waiting
TURN_SECONDS = 1.0  # until it is asked again whether it is a Pod's turn on its node
PATIENCE_MS = 60_000  # an end may wait so long to be tidied up after, while others wait to be told of
BUSY_SECONDS = 2.0  # until it is asked again whether that is over
LOG_PATIENCE_MS = 300_000  # how long a log is tried to be read after its end, of a node that does not answer
_REMOVED_SOON = frozenset({Reason.EVICTED, Reason.STORAGE_LIMIT_EXCEEDED})  # by the kubelet, with the log

log = logging.getLogger("cloudai.operator")


class Tidying:
    """`is_busy`: whether other work should come first. `tidied(name)` is called for each Task with a Pod less to look after."""

    def __init__(
        self,
        api: Api,
        pods_path: str,
        facts: Facts,
        archive: Archive,
        is_busy: Callable[[], bool],
        tidied: Callable[[str], None],
    ) -> None:
        self._api = api
        self._pods_path = pods_path
        self._facts = facts
        self._archive = archive
        self._is_busy = is_busy
        self._tidied = tidied
        self._queue = WorkQueue(self._tidy)
        self._reading: Counter[str] = Counter()  # logs, by node
        self._unread: dict[str, int] = {}  # by Pod: since when its log cannot be read

    async def run(self) -> None:
        """Until cancelled."""
        await self._queue.run(TIDIERS)

    def add(self, task: str, pod: str) -> None:
        """An attempt has ended and its end is in the Task's status."""
        self._queue.add(f"{task}/{pod}")

    async def _tidy(self, key: str) -> float | None:
        name, _, pod_name = key.partition("/")
        pod, seen = self._facts.memory.pods_of(name).get(pod_name), self._facts.memory.tasks.get(name)
        if pod is None or not pod.held or not pod.run.phase.terminal:
            self._unread.pop(pod_name, None)
            return None
        urgent = pod.deleting or pod.run.reason in _REMOVED_SOON
        if not urgent and self._is_busy() and now_ms() - (pod.run.finished_at or pod.run.created_at) < PATIENCE_MS:
            return BUSY_SECONDS
        node = pod.run.worker_id
        if self._reading[node] >= A_NODE:
            return TURN_SECONDS
        if seen is not None and seen.uid == pod.owner:
            owner = {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": seen.uid}
            at_last = now_ms() - self._unread.setdefault(pod_name, now_ms()) >= LOG_PATIENCE_MS
            self._reading[node] += 1
            try:
                await self._archive.keep(pod, owner, at_last)
            except (ApiError, CloudAIError) as error:
                if not at_last:
                    raise
                log.warning("the log of %s is lost: %s", pod_name, error)
            finally:
                self._reading[node] -= 1
            self._unread.pop(pod_name, None)
        await self.release(pod_name, pod)
        self._tidied(name)
        return None

    async def release(self, pod_name: str, pod: SeenPod) -> None:
        """Let Kubernetes remove the Pod when it likes: nobody asks for its log any more."""
        if not pod.held:
            return
        left = [one for one in pod.finalizers if one != FINALIZER]
        body = {"metadata": {"resourceVersion": str(pod.version), "finalizers": left or None}}
        try:
            self._facts.memory.put_pod(await self._api.patch(f"{self._pods_path}/{pod_name}", body))
        except ApiError as error:
            if error.status == 404:
                self._facts.memory.drop_pod(pod.run.task_id, pod_name, pod.uid)
            elif error.status == 409:
                await self._facts.fetched_pod(pod_name)
                raise
            else:
                raise
        self._archive.forget(pod)
