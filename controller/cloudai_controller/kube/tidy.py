"""After an end has been told of: its log is kept, then its Pod is let go."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.resources import Reason
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import FINALIZER
from cloudai.store.kube.task_resource import API_VERSION, KIND, Json
from cloudai_controller.kube.archive import Archive, is_of_kubelet
from cloudai_controller.kube.facts import Facts
from cloudai_controller.kube.state import SeenPod
from cloudai_controller.kube.workqueue import WorkQueue

TIDIERS = 8
A_NODE = 4  # of these at most read from the same node: one that does not answer must not keep all others waiting
PATIENCE_MS = 60_000  # an end may wait so long to be tidied up after, while others wait to be told of
BUSY_SECONDS = 2.0  # until it is asked again whether that is over
LOG_PATIENCE_MS = 300_000  # how long a log is tried to be read after its end, of a node that does not answer
KUBELET_MS = 10_000  # the same of one that does not know the Pod
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
        self._turns: Counter[str] = Counter()  # how many are taken, by node
        self._given: dict[str, str] = {}  # keys that need not wait any more, and the node that they have a turn on
        self._waiting: defaultdict[str, dict[str, bool]] = defaultdict(dict)  # by node, in order: whether it is urgent
        # By Pod, with its uid: since when (ms) its log cannot be read, and since when its node says that it does not know it.
        self._unread: dict[str, tuple[str, int, int | None]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        await self._queue.run(TIDIERS)

    def add(self, task: str, pod: str) -> None:
        """An attempt has ended and its end is in the Task's status."""
        self._queue.add(f"{task}/{pod}")

    async def _tidy(self, key: str) -> float | None:
        """Whoever had a turn gives it on, also where nothing was left to do: others wait for nothing else."""
        node = self._given.pop(key, None)
        try:
            name, _, pod_name = key.partition("/")
            pod, seen = self._facts.memory.pods_of(name).get(pod_name), self._facts.memory.tasks.get(name)
            if pod is None or not pod.held or not pod.run.phase.terminal:
                self._unread.pop(pod_name, None)
                return None
            urgent = pod.deleting or pod.run.reason in _REMOVED_SOON
            if not urgent and self._is_busy() and now_ms() - (pod.run.finished_at or pod.run.created_at) < PATIENCE_MS:
                return BUSY_SECONDS
            if node is None and self._turns[pod.run.worker_id] >= A_NODE:
                self._waiting[pod.run.worker_id][key] = urgent
                return None
            if node is None:
                node = pod.run.worker_id
                self._turns[node] += 1
            if seen is not None and seen.uid == pod.owner:
                owner = {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": seen.uid}
                if (again := await self._keep(pod_name, pod, owner)) is not None:
                    return again
            await self.release(pod_name, pod)
            self._tidied(name)
            return None
        finally:
            if node is not None:
                self._give_on(node)

    def _give_on(self, node: str) -> None:
        """To the first urgent one that waits, else to the first one."""
        waiting = self._waiting[node]
        if waiting:
            key = max(waiting, key=waiting.__getitem__)
            del waiting[key]
            self._given[key] = node
            self._queue.add(key)
        else:
            self._turns[node] -= 1
            if not self._turns[node]:
                del self._turns[node]
        if not waiting:
            del self._waiting[node]

    async def _keep(self, pod_name: str, pod: SeenPod, owner: Json) -> float | None:
        """Seconds until that is tried again, where its node does not know the Pod."""
        is_last = partial(self._is_last, pod_name, pod)
        try:
            await self._archive.keep(pod, owner, is_last)
        except (ApiError, CloudAIError) as error:
            unknown = is_of_kubelet(error)
            if not is_last(error):
                if unknown:
                    return KUBELET_MS / 1000
                raise
            if not unknown:
                log.warning("the log of %s is lost: %s", pod_name, error)
        return None

    def _is_last(self, pod_name: str, pod: SeenPod, error: Exception) -> bool:
        """Whether its log, which `error` kept from being read, was tried to be read for long enough; notes since when it is."""
        now, known = now_ms(), self._unread.get(pod_name)
        _, since, unknown = known if known is not None and known[0] == pod.uid else (pod.uid, now, None)
        unknown = (now if unknown is None else unknown) if is_of_kubelet(error) else None
        self._unread[pod_name] = (pod.uid, since, unknown)
        return now - since >= LOG_PATIENCE_MS or (unknown is not None and now - unknown >= KUBELET_MS)

    async def release(self, pod_name: str, pod: SeenPod) -> None:
        """Let Kubernetes remove the Pod when it likes: nobody asks for its log any more."""
        self._unread.pop(pod_name, None)
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
