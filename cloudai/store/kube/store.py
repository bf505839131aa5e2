"""The store that the facade serves on Kubernetes: reads from the watch cache, writes of wishes to the API server.

Tasks are those of one namespace. What becomes of them is written by the operator alone; here only Tasks are made and their
cancellation is wished. What this process wrote it reads back at once: the answer to a write goes into the cache before
the watch tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError, Code, invalid, task_not_found, unavailable
from cloudai.resources import Reason, Run, Task, TaskSpec, TaskStatus, WorkerState, run_id
from cloudai.settings import Settings
from cloudai.store.kube.api import Api, ApiError, Lacking, NoCluster, NoNamespace, NoResource, as_unavailable, connect
from cloudai.store.kube.awaited import Awaited
from cloudai.store.kube.cache import NodeCache, PodCache, TaskCache
from cloudai.store.kube.denial import denied
from cloudai.store.kube.logs import Absent, Log, PodLogs
from cloudai.store.kube.pods import Held
from cloudai.store.kube.revisions import Revisions
from cloudai.store.kube.task_resource import CANCEL, GROUP, SUBMITTED, Json, millis, task_of, task_resource, tasks_path
from cloudai.store.kube.watch import ODD, Follower, follow
from cloudai.store.protocol import Change, Idempotency, Lease, LogSlice, TaskPage, TaskQuery

SYNC_SECONDS = 100.0  # how long a start may take until everything was listed once: large clusters have many Pods
NEW_SECONDS = 10.0  # that the Task resource may be away at a start: it may only just have been made,
NEW_AGAIN_SECONDS = 0.5  # and how often it is looked for
POLL_SECONDS = 10.0  # between looks at the nodes' leases, which cache.py counts, and usage
SLOW_SECONDS = 1.5  # after which who probes is told whether the API server was heard of lately
HEARD_SECONDS = 60.0  # without a word, after which it counts as away
CANCEL_SECONDS = 1.0  # how long a cancel of a task that never started waits for the operator's word
LOG_SECONDS = 30.0  # how long a log is asked for that is on its way to its archive,
LOG_AGAIN_SECONDS = 0.25  # and how often
KEYED = 4 * 10**18  # names from here on are of idempotency keys; as nanoseconds they would be times after 2096
SUBMIT = f"{GROUP}/submit"  # annotation: which request made the Task
LEASES = "/apis/coordination.k8s.io/v1/namespaces"
# Of a refusal that may be over soon though its status does not say so; a quota that was just made has no status yet.
_PASSING = ("exceeded quota", "status unknown for quota", "cannot create resource", "being terminated")

log = logging.getLogger("cloudai.kubernetes")


async def open_kubernetes(settings: Settings) -> KubernetesStore:
    """Raises NoCluster, or `unavailable` where the cluster does not answer or lets us do nothing."""
    store = KubernetesStore(await connect(settings), settings)
    try:
        await store.start()
    except BaseException:
        await store.close()
        raise
    return store


class KubernetesStore:
    """A `FacadeStore`. `open_kubernetes` makes it."""

    agents = None  # the kubelets are

    def __init__(self, api: Api, settings: Settings) -> None:
        self._api = api
        self._namespace = settings.namespace
        self._tasks_path = tasks_path(self._namespace)
        self._revisions = Revisions()
        self._awaited = Awaited()
        self._tasks = TaskCache(self._revisions, self._awaited)
        self._pods = PodCache(self._revisions, self._awaited, self._namespace, settings.gpu_resource)
        self._nodes = NodeCache(self._revisions, self._pods, settings.gpu_resource)
        self._logs = PodLogs(api, self._namespace)
        self._last_id = 0
        self._heard_at = float("-inf")
        self.cluster_id = ""
        self._works: list[asyncio.Task[None]] = []
        self._synced: list[asyncio.Event] = []

    async def start(self) -> None:
        """Returns once every collection was listed. Raises NoCluster, or `unavailable` where that does not come about."""
        follows: list[tuple[str, Follower]] = [
            (self._tasks_path, self._tasks),
            ("/api/v1/pods", self._pods),
            ("/api/v1/nodes", self._nodes),
        ]
        for path, follower in follows:
            synced = asyncio.Event()
            self._synced.append(synced)
            self._works.append(asyncio.ensure_future(follow(self._api, path, follower, synced.set)))
        self._works.append(asyncio.ensure_future(self._poll()))
        try:
            self.cluster_id = await self._identity()
            await self._knows_tasks()
        except Lacking as error:
            raise NoCluster(error.message) from None
        except ApiError as error:
            raise as_unavailable(error) from None
        waits = asyncio.gather(*(event.wait() for event in self._synced))
        try:
            async with asyncio.timeout(SYNC_SECONDS):
                await waits
        except TimeoutError:
            raise unavailable("the Kubernetes API did not list tasks, pods and nodes in time") from None
        self._heard_at = time.monotonic()

    async def _identity(self) -> str:
        """The namespace's: another one of the same name has other tasks."""
        try:
            found = await self._api.get(f"/api/v1/namespaces/{self._namespace}")
        except ApiError as error:
            if error.status == 404:
                raise NoNamespace(self._namespace) from None
            raise
        return str(found["metadata"]["uid"])

    async def _knows_tasks(self) -> None:
        deadline = time.monotonic() + NEW_SECONDS
        while True:
            try:
                await self._api.get(self._tasks_path, limit=1)
                return
            except NoResource:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(NEW_AGAIN_SECONDS)

    async def close(self) -> None:
        # First, to cut off what is under way: a request that is cancelled says TLS's farewell, which outlives the event loop.
        await self._api.close()
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)
        await self._logs.close()

    # -- tasks

    async def create_task(self, spec: TaskSpec, idempotency: Idempotency | None = None) -> Task:
        if spec.resources.gpu % 1000:
            raise invalid("req_gpu", "must be a whole number: Kubernetes hands out whole GPUs")
        try:
            if idempotency is not None:
                return await self._create_once(spec, idempotency)
            token = secrets.token_hex(8)
            while True:
                task = await self._create(self._next_id(), spec, token)
                if task is not None:
                    return task
        except ApiError as error:
            raise _refused(error) from None

    def _next_id(self) -> str:
        self._last_id = max(time.time_ns(), self._last_id + 1)
        return f"task-{self._last_id}"

    async def _create(self, name: str, spec: TaskSpec, token: str) -> Task | None:
        """None where another submit has taken the name."""
        resource = task_resource(name, self._namespace, spec)
        resource["metadata"]["annotations"] = {SUBMIT: token, SUBMITTED: str(now_ms())}
        try:
            made = await self._api.create(self._tasks_path, resource)
        except ApiError as error:
            if not error.already_exists:
                raise
            made = await self._api.get(f"{self._tasks_path}/{name}")
            if (made["metadata"].get("annotations") or {}).get(SUBMIT) != token:
                return None
        self._tasks.changed(made)
        return task_of(made)

    async def _create_once(self, spec: TaskSpec, idempotency: Idempotency) -> Task:
        """The key is the Task's name: while that is there, the same key finds it."""
        number = int.from_bytes(hashlib.sha256(idempotency.key.encode()).digest()[:8]) % KEYED
        token = hashlib.sha256(idempotency.key.encode() + idempotency.digest).hexdigest()
        task = await self._create(f"task-{KEYED + number}", spec, token)
        if task is None:
            raise CloudAIError(
                Code.IDEMPOTENCY_CONFLICT,
                "This Idempotency-Key came before with another body",
                {"field": "Idempotency-Key", "reason": "was used with another body"},
            )
        return task

    async def get_task(self, task_id: str) -> Task:
        task = self._tasks.get(task_id)
        if task is None:
            task = await self._fetched(task_id)
        return self._as_waiting(task)

    async def _fetched(self, task_id: str) -> Task:
        """A Task that another replica made may not have been told of yet."""
        if not _possible(task_id):
            raise task_not_found(task_id)
        try:
            found = await self._api.get(f"{self._tasks_path}/{task_id}")
        except ApiError as error:
            raise task_not_found(task_id) if error.status == 404 else as_unavailable(error) from None
        self._tasks.changed(found)
        return task_of(found)

    def _as_waiting(self, task: Task) -> Task:
        """A queued task with the scheduler's present words; what is stored is when they were first said."""
        if task.status is not TaskStatus.QUEUED:
            return task
        pod = self._pod(task.task_id, task.attempt + 1)
        run = None if pod is None else pod.run
        if run is None or run.phase.terminal or run.worker_id or run.message is None:
            words = task.message or "Waits for the operator to make its Pod."
            return replace(task, reason=task.reason or Reason.WAITING_FOR_CAPACITY, message=words)
        return replace(task, reason=run.reason, message=run.message)

    async def get_tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        found = ((task_id, self._tasks.get(task_id)) for task_id in task_ids)
        return {task_id: task for task_id, task in found if task is not None}

    async def list_tasks(self, query: TaskQuery) -> TaskPage:
        page = self._tasks.page(query)
        return TaskPage([self._as_waiting(task) for task in page.tasks], page.total)

    async def cancel_task(self, task_id: str) -> Task:
        task = await self.get_task(task_id)
        if not task.cancel_requested and not task.status.terminal:
            try:
                wished = await self._api.patch(f"{self._tasks_path}/{task_id}", CANCEL)
            except ApiError as error:
                raise task_not_found(task_id) if error.status == 404 else as_unavailable(error) from None
            self._tasks.changed(wished)
            task = task_of(wished)
        if task.status is TaskStatus.QUEUED:
            await self._tasks.until(task_id, _has_begun_or_ended, CANCEL_SECONDS)
            task = self._tasks.get(task_id) or task
        if task.status in (TaskStatus.COMPLETED, TaskStatus.FAILED):
            words = f"The task is {task.status.value} and can no longer be cancelled"
            raise CloudAIError(Code.TASK_FINISHED, words, {"task_id": task_id, "status": task.status.value})
        return task

    async def totals(self) -> Mapping[TaskStatus, int]:
        return self._tasks.totals()

    # -- workers

    async def list_workers(self) -> list[WorkerState]:
        return self._nodes.states()

    async def get_worker(self, worker_id: str) -> WorkerState:
        state = self._nodes.state(worker_id)
        if state is None:
            raise CloudAIError(Code.WORKER_NOT_FOUND, "Worker not found", {"worker_id": worker_id})
        return state

    async def runs_of_worker(self, worker_id: str) -> list[Run]:
        held = [one for one in self._pods.on(worker_id) if one.run is not None and not one.run.phase.terminal]
        return sorted(map(self._owned, held), key=lambda run: (run.created_at, run.run_id))

    def _owned(self, held: Held) -> Run:
        """With its user, as the Task that it was made for says; of one that is gone nobody knows."""
        assert held.run is not None
        task = self._tasks.get(held.run.task_id)
        if task is None or held.owner != self._tasks.uid(task.task_id):
            return held.run
        return replace(held.run, user_id=task.spec.user_id)

    async def _poll(self) -> None:
        """Heartbeats are the nodes' leases, which are not watched: each is renewed every ten seconds."""
        while True:
            try:
                pages = self._api.pages(f"{LEASES}/kube-node-lease/leases", resourceVersion="0")
                self._nodes.heard({one["metadata"]["name"]: _renewed(one) async for page, _ in pages for one in page})
                self._heard_at = time.monotonic()
                self._nodes.used(await self._usage())
            except (ApiError, CloudAIError, *ODD) as error:
                log.warning("the nodes' leases cannot be read: %s", error)
            await asyncio.sleep(POLL_SECONDS)

    async def _usage(self) -> dict[str, Mapping[str, str]]:
        try:
            measured = await self._api.get("/apis/metrics.k8s.io/v1beta1/nodes")
        except (ApiError, CloudAIError):
            return {}  # no metrics server, or one that is not well: usage is not known
        return {one["metadata"]["name"]: one["usage"] for one in measured["items"]}

    # -- logs

    def _pod(self, task_id: str, number: int) -> Held | None:
        return self._pods.attempt(task_id, self._tasks.uid(task_id), number)

    def _log(self, task_id: str, number: int) -> Log:
        return Log(run_id(task_id, number), self._tasks.uid(task_id))

    async def read_log(self, task_id: str, attempt: int | None, offset: int, limit: int) -> LogSlice:
        task = await self.get_task(task_id)
        number = task.attempt if attempt is None else attempt
        pod = self._pod(task_id, number)
        if number < 1 or (number > task.attempt and pod is None):
            details = {"task_id": task_id, "attempt": number}
            raise CloudAIError(Code.ATTEMPT_NOT_FOUND, "The task has no such attempt", details)
        known = {one.attempt: one for one in self._tasks.attempts(task_id)}
        try:
            return await self._read(task, number, offset, limit)
        except Absent:
            began = known[number].started_at if number in known else task.started_at
            if began is None:
                return LogSlice(b"", 0, 0, True)
            raise CloudAIError(Code.LOGS_REMOVED, "The logs of this attempt are gone", {"task_id": task_id}) from None
        except ApiError as error:
            raise as_unavailable(error) from None

    def _log_is_over(self, task: Task, number: int) -> bool:
        pod = self._pod(task.task_id, number)
        told = number in {one.attempt for one in self._tasks.attempts(task.task_id)}
        return told or task.status.terminal or (pod is not None and pod.log_over)

    async def _read(self, task: Task, number: int, offset: int, limit: int) -> LogSlice:
        """Between the kubelet, which has a log no more, and the operator, which does not have it yet, it is waited for; and
        so is the news of an end that the kubelet knows of already.
        """
        of = self._log(task.task_id, number)
        deadline = time.monotonic() + LOG_SECONDS
        while True:
            pod, ended = self._pod(task.task_id, number), self._log_is_over(task, number)
            if not ended and not _began(pod):
                return LogSlice(b"", 0, 0, False)
            try:
                return await self._logs.read(of, offset, limit, ended=ended)
            except Absent:
                if ended and (pod is None or not pod.log_due):
                    raise
            if time.monotonic() > deadline:
                raise unavailable("the log of this attempt cannot be read yet")
            await asyncio.sleep(LOG_AGAIN_SECONDS)

    async def wait_log(self, task_id: str, attempt: int | None, beyond: int, timeout: float) -> None:
        with self._awaited.of(task_id) as news, contextlib.suppress(TimeoutError):
            task = await self.get_task(task_id)
            number = task.attempt if attempt is None else attempt
            if self._log_is_over(task, number):
                return
            began = _began(self._pod(task_id, number))
            async with asyncio.timeout(timeout):
                if not began or not await self._logs.wait(self._log(task_id, number), beyond):
                    await news.wait()

    # -- beside

    async def watch(self, since: int | None = None) -> AsyncIterator[Sequence[Change]]:
        async for batch in self._revisions.after(since):
            yield batch

    async def get_lease(self, name: str) -> Lease | None:
        """Who leads among the operators."""
        try:
            lease = await self._api.get(f"{LEASES}/{self._namespace}/leases/cloudai-{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise as_unavailable(error) from None
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        return Lease(name, holder, spec.get("leaseTransitions", 0), int(lease["metadata"]["resourceVersion"]))

    async def ping(self) -> None:
        """Also that everything was listed: a cache that knows nothing must not answer; and that there are Tasks, which a cache
        would not tell, and a namespace for them, which no list tells. An API server that is slow is not away:
        all replicas have the same one, and if none were ready its slowness would become an outage.
        """
        if not all(event.is_set() for event in self._synced):
            raise unavailable("the Kubernetes API has not listed everything yet")
        if any(work.done() for work in self._works):
            raise unavailable("what is known of the cluster is not kept up to date any more: restart this process")
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                await self._identity()
                await self._api.get(self._tasks_path, limit=1)
            self._heard_at = time.monotonic()
        except ApiError as error:
            raise as_unavailable(error) from None
        except (TimeoutError, CloudAIError) as error:
            silent = time.monotonic() - self._heard_at
            if silent > HEARD_SECONDS:
                words = str(error) or "nothing"
                raise unavailable(
                    f"the Kubernetes API has not been heard of for {silent:.0f} s; it says: {words}"
                ) from None


def _possible(name: str) -> bool:
    """Whether the API server would take it as a name in a path."""
    return 0 < len(name) <= 63 and all(one.isascii() and (one.isalnum() or one == "-") for one in name)


def _has_begun_or_ended(task: Task | None) -> bool:
    return task is None or task.status is not TaskStatus.QUEUED


def _began(pod: Held | None) -> bool:
    return pod is not None and pod.run is not None and pod.run.started_at is not None


def _renewed(lease: Json) -> int:
    return millis(lease["spec"].get("renewTime")) or 0


def _refused(error: ApiError) -> CloudAIError:
    """A submit that the API server does not take."""
    causes = error.details.get("causes") or []
    if error.status == 422 and causes:
        field = str(causes[0].get("field") or "task").removeprefix("spec.")
        return invalid(field, str(causes[0].get("message") or error.message))
    passes = error.status == 429 or error.status >= 500 or any(sign in error.message for sign in _PASSING)
    if not passes and (error.status in (400, 403, 413, 422) or denied(error.message)):  # 413: more than etcd takes
        return invalid("task", f"the cluster refuses it: {error.message}")
    return as_unavailable(error)
