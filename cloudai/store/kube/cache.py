"""What the watches tell, kept the way it is asked for: no request of a client costs the API server a list.

Projections, not whole objects: a Task, what a Pod holds, a Node without its images.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left, insort
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

from cloudai.resources import Task, TaskStatus, Worker, WorkerState, run_id
from cloudai.store.kube.awaited import Awaited
from cloudai.store.kube.nodes import state_of, worker_of
from cloudai.store.kube.pods import Held, held
from cloudai.store.kube.revisions import Revisions
from cloudai.store.kube.task_resource import Attempt, Json, attempts_of, task_of
from cloudai.store.kube.watch import Key, key_of
from cloudai.store.protocol import Kind, TaskPage, TaskQuery

REMEMBERED = 10_000  # of what was deleted
# Looks at its Lease, one every ten seconds, that find it as before until a node counts as silent: 50 s, as Kubernetes itself
# takes for that; a kubelet renews every ten seconds. See `--node-monitor-grace-period` in
# https://kubernetes.io/docs/reference/command-line-tools-reference/kube-controller-manager/
SILENT_LOOKS = 5

_Filter = tuple[str | None, TaskStatus | None]
_Place = tuple[int, str]


class TaskCache:
    """Every Task, by name and in the order of lists."""

    def __init__(self, revisions: Revisions, awaited: Awaited) -> None:
        self._revisions = revisions
        self._awaited = awaited
        self._tasks: dict[str, Task] = {}
        self._attempts: dict[str, list[Attempt]] = {}
        self._uids: dict[str, str] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()  # uids of what was deleted, the latest
        self._lists: defaultdict[_Filter, list[_Place]] = defaultdict(list)

    # -- what the watch tells

    def only(self, keys: Set[Key], version: int) -> None:
        """Forget the others, but for what was written here since."""
        for name in self._tasks.keys() - {name for _, name in keys}:
            if self._tasks[name].version <= version:
                self._drop(name)

    def changed(self, resource: Json) -> None:
        """Also what a write of our own gave back: the newer one stays, and what is gone stays away."""
        task = task_of(resource)
        name, before = task.task_id, self._tasks.get(task.task_id)
        uid = resource["metadata"]["uid"]
        if uid in self._gone or (before is not None and before.version >= task.version):
            return
        if before is not None:
            self._place(before, False)
            if self._uids[name] != uid:
                self._attempts.pop(name, None)
        self._tasks[name], self._uids[name] = task, uid
        self._place(task, True)
        if attempts := attempts_of(resource.get("status") or {}):
            self._attempts[name] = attempts
        for event in _events(before, task):
            self._revisions.add(Kind.TASK, name, event)
        self._awaited.wake(name)

    def deleted(self, resource: Json) -> None:
        name, uid = resource["metadata"]["name"], resource["metadata"]["uid"]
        self._remember_gone(uid)  # also one that was never told of: the answer to its submit may still be on its way
        if self._uids.get(name) == uid:
            self._drop(name)

    def _remember_gone(self, uid: str) -> None:
        self._gone[uid] = None
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def _drop(self, name: str) -> None:
        self._place(self._tasks.pop(name), False)
        self._attempts.pop(name, None)
        self._remember_gone(self._uids.pop(name))
        self._revisions.add(Kind.TASK, name, "deleted")
        self._awaited.wake(name)

    def _place(self, task: Task, there: bool) -> None:
        place = (task.created_at, task.task_id)
        user, status = task.spec.user_id, task.status
        for key in ((None, None), (user, None), (None, status), (user, status)):
            places = self._lists[key]
            if there:
                insort(places, place)
            else:
                del places[bisect_left(places, place)]
                if not places:
                    del self._lists[key]

    # -- what is asked

    def get(self, name: str) -> Task | None:
        """The Task of that name, as far as is known."""
        return self._tasks.get(name)

    def uid(self, name: str) -> str:
        """Of the Task of that name; empty where none is known."""
        return self._uids.get(name, "")

    def attempts(self, name: str) -> Sequence[Attempt]:
        """Those that have ended."""
        return self._attempts.get(name, ())

    def page(self, query: TaskQuery) -> TaskPage:
        """The newest first."""
        places = self._lists.get((query.user_id, query.status), [])
        end = max(0, len(places) - query.offset)
        chosen = places[max(0, end - query.limit) : end]
        return TaskPage([self._tasks[name] for _, name in reversed(chosen)], len(places))

    def totals(self) -> Mapping[TaskStatus, int]:
        """How many Tasks are in each status."""
        return {status: len(self._lists.get((None, status), ())) for status in TaskStatus}

    async def until(self, name: str, true: Any, seconds: float) -> None:
        """Return when `true(task)` holds (None: no such task) or the time is over."""
        with self._awaited.of(name) as news, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not true(self._tasks.get(name)):
                    news.clear()
                    await news.wait()


def _events(before: Task | None, task: Task) -> list[str]:
    """The task's new status; an end that nobody saw running is told as both."""
    if before is not None and before.status is task.status:
        return ["updated"]
    ran = task.status.terminal and task.started_at is not None
    if ran and before is not None and before.status is not TaskStatus.RUNNING:
        return [TaskStatus.RUNNING.value, task.status.value]
    return [task.status.value]


class PodCache:
    """What each Pod of the cluster holds, by node; and the Pods of ours by name."""

    def __init__(self, revisions: Revisions, awaited: Awaited, namespace: str, gpu: str) -> None:
        self._revisions = revisions
        self._awaited = awaited
        self._gpu = gpu
        self._namespace = namespace
        self._held: dict[Key, Held] = {}
        self._on: defaultdict[str, dict[Key, Held]] = defaultdict(dict)

    def only(self, keys: Set[Key], version: int) -> None:  # noqa: ARG002 - nothing else is written here
        for key in self._held.keys() - keys:
            self._drop(key)

    def changed(self, resource: Json) -> None:
        key, now = key_of(resource), held(resource, self._gpu, self._namespace)
        before = self._held.get(key)
        if before is not None and before.node != now.node:
            self._take_off(before.node, key)
        self._held[key] = now
        if now.node:
            self._on[now.node][key] = now
        if now.run is not None and (before is None or before.run is None or before.run.phase is not now.run.phase):
            self._revisions.add(Kind.RUN, now.run.run_id, now.run.phase.value)
        if now.run is not None:
            self._awaited.wake(now.run.task_id)

    def deleted(self, resource: Json) -> None:
        key = key_of(resource)
        if key in self._held:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        gone = self._held.pop(key)
        self._take_off(gone.node, key)
        if gone.run is not None:
            self._awaited.wake(gone.run.task_id)

    def _take_off(self, node: str | None, key: Key) -> None:
        if node:
            del self._on[node][key]
            if not self._on[node]:
                del self._on[node]

    def attempt(self, task: str, uid: str, number: int) -> Held | None:
        """That attempt of the Task of that uid, while it has a Pod: one of the same name may be of a Task before it."""
        found = self._held.get((self._namespace, run_id(task, number)))
        return found if found is not None and uid and found.owner == uid else None

    def on(self, node: str) -> list[Held]:
        """What Pods hold of that node."""
        return list(self._on.get(node, {}).values())


class NodeCache:
    """The Nodes, with when each was heard of last and what it uses; the last two are told by `heard` and `used`."""

    def __init__(self, revisions: Revisions, pods: PodCache, gpu: str) -> None:
        self._revisions = revisions
        self._gpu = gpu
        self._pods = pods
        self._nodes: dict[str, Json] = {}
        self._heard: dict[str, int] = {}
        self._unrenewed: dict[str, int] = {}  # how many looks since the last one that found a renewal
        self._usage: dict[str, Mapping[str, str]] = {}
        self._workers: dict[str, Worker] = {}

    def only(self, keys: Set[Key], version: int) -> None:  # noqa: ARG002 - nothing else is written here
        for name in self._nodes.keys() - {name for _, name in keys}:
            self._drop(name)

    def changed(self, resource: Json) -> None:
        name, new = resource["metadata"]["name"], resource["metadata"]["name"] not in self._nodes
        status = resource.get("status") or {}
        kept = ("allocatable", "conditions", "addresses", "daemonEndpoints")
        meta = {key: resource["metadata"][key] for key in ("name", "uid", "creationTimestamp")}
        spec = {"unschedulable": resource["spec"].get("unschedulable", False)}
        known = {"metadata": meta, "spec": spec, "status": {key: status[key] for key in kept if key in status}}
        ready = None if new else self._workers[name].ready
        self._nodes[name] = known
        self._learn(name)
        if new or self._workers[name].ready != ready:
            self._revisions.add(Kind.WORKER, name, "registered" if new else "updated")

    def deleted(self, resource: Json) -> None:
        if resource["metadata"]["name"] in self._nodes:
            self._drop(resource["metadata"]["name"])

    def _drop(self, name: str) -> None:
        del self._nodes[name], self._workers[name]
        self._revisions.add(Kind.WORKER, name, "updated")

    def heard(self, renewed: Mapping[str, int]) -> None:
        """When each node's Lease was renewed, in ms by its own clock: so only whether that changes from look to look says
        that a node lives. A look that fails says nothing of any, and is not told of here.
        """
        self._unrenewed = {
            name: self._unrenewed.get(name, 0) + 1 if renewed.get(name) == self._heard.get(name) else 0
            for name in self._nodes
        }
        self._heard = dict(renewed)
        self._learn_all()

    def used(self, usage: Mapping[str, Mapping[str, str]]) -> None:
        """What each node uses, as metrics.k8s.io says."""
        self._usage = dict(usage)
        self._learn_all()

    def _learn_all(self) -> None:
        for name in self._nodes:
            self._learn(name)

    def _learn(self, name: str) -> None:
        silent = self._unrenewed.get(name, 0) >= SILENT_LOOKS
        usage = self._usage.get(name)
        self._workers[name] = worker_of(self._nodes[name], self._heard.get(name), silent, usage, self._gpu)

    def state(self, name: str) -> WorkerState | None:
        """That node as a worker, as far as is known."""
        worker = self._workers.get(name)
        return None if worker is None else state_of(worker, self._pods.on(name))

    def states(self) -> list[WorkerState]:
        """Every node as a worker, by name."""
        return [state_of(self._workers[name], self._pods.on(name)) for name in sorted(self._workers)]
