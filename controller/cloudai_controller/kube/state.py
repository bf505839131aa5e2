"""What the operator holds of Tasks and Pods: as little as a look needs, whichever way it was told.

A Task that is not finished is kept as the JSON it came as; of a finished one only when it ended. Of a Pod the Run that it is,
and what deleting it takes. The newer version stays, so a late event or a list changes nothing back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cloudai.resources import Run, TaskStatus
from cloudai.store.kube.pods import FINALIZER, run_of
from cloudai.store.kube.task_resource import PHASES, TASK_LABEL, millis

Json = dict[str, Any]

_TERMINAL = frozenset(PHASES[status] for status in TaskStatus if status.terminal)


@dataclass(frozen=True, slots=True)
class SeenTask:
    """`document`: the resource as JSON; None for a finished Task without live Pods to look after."""

    uid: str
    version: int
    document: bytes | None
    finished_at: int | None

    def resource(self) -> Json:
        assert self.document is not None
        resource: Json = orjson.loads(self.document)
        return resource


@dataclass(frozen=True, slots=True)
class SeenPod:
    uid: str
    version: int
    run: Run
    finalizers: tuple[str, ...]
    deleting: bool

    @property
    def held(self) -> bool:
        """Whether our finalizer keeps it."""
        return FINALIZER in self.finalizers


def seen_task(resource: Mapping[str, Any]) -> SeenTask:
    meta = resource["metadata"]
    status = resource.get("status") or {}
    finished = status.get("phase") in _TERMINAL
    slim = {name: resource.get(name) for name in ("apiVersion", "kind", "spec", "status")}
    kept = (
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "labels",
        "deletionTimestamp",
    )
    slim["metadata"] = {name: meta[name] for name in kept if name in meta}
    return SeenTask(
        meta["uid"],
        int(meta["resourceVersion"]),
        orjson.dumps(slim),
        (millis(status.get("finishedAt")) or 0) if finished else None,
    )


def seen_pod(pod: Mapping[str, Any]) -> SeenPod:
    meta = pod["metadata"]
    return SeenPod(
        meta["uid"],
        int(meta["resourceVersion"]),
        run_of(pod),
        tuple(meta.get("finalizers") or ()),
        meta.get("deletionTimestamp") is not None,
    )


class Memory:
    """Tasks by name and their Pods; every method returns whether anything changed."""

    def __init__(self) -> None:
        self.tasks: dict[str, SeenTask] = {}
        self.pods: defaultdict[str, dict[str, SeenPod]] = defaultdict(dict)

    def put_task(self, resource: Mapping[str, Any]) -> bool:
        name, now = resource["metadata"]["name"], seen_task(resource)
        before = self.tasks.get(name)
        if before is not None and (before.version >= now.version and before.uid == now.uid):
            return False
        self.tasks[name] = now
        return True

    def drop_task(self, name: str, uid: str) -> bool:
        if name not in self.tasks or self.tasks[name].uid != uid:
            return False
        del self.tasks[name]
        return True

    def put_pod(self, pod: Mapping[str, Any]) -> bool:
        task, name, now = pod["metadata"]["labels"][TASK_LABEL], pod["metadata"]["name"], seen_pod(pod)
        before = self.pods[task].get(name) if task in self.pods else None
        if before is not None and before.version >= now.version and before.uid == now.uid:
            return False
        self.pods[task][name] = now
        return True

    def drop_pod(self, task: str, name: str, uid: str) -> bool:
        known = self.pods.get(task, {})
        if name not in known or known[name].uid != uid:
            return False
        del known[name]
        if not known:
            del self.pods[task]
        return True

    def pods_of(self, task: str) -> dict[str, SeenPod]:
        return dict(self.pods.get(task, {}))

    def settle(self, name: str) -> None:
        """Nothing more is to be decided of a finished Task: forget all but when it goes."""
        task = self.tasks.get(name)
        if task is not None and task.finished_at is not None:
            self.tasks[name] = SeenTask(task.uid, task.version, None, task.finished_at)

    def listed_tasks(self, resources: Iterable[Mapping[str, Any]]) -> set[str]:
        """All there are; returns the names that changed or are gone."""
        found = {resource["metadata"]["name"]: resource for resource in resources}
        changed = {name for name, resource in found.items() if self.put_task(resource)}
        for name in self.tasks.keys() - found.keys():
            del self.tasks[name]
            changed.add(name)
        return changed

    def listed_pods(self, pods: Iterable[Mapping[str, Any]]) -> set[str]:
        """All there are; returns the names of Tasks whose Pods changed or are gone."""
        changed: set[str] = set()
        found: set[tuple[str, str]] = set()
        for pod in pods:
            task = pod["metadata"]["labels"][TASK_LABEL]
            found.add((task, pod["metadata"]["name"]))
            if self.put_pod(pod):
                changed.add(task)
        for task in list(self.pods):
            for name in list(self.pods[task]):
                if (task, name) not in found:
                    self.drop_pod(task, name, self.pods[task][name].uid)
                    changed.add(task)
        return changed
