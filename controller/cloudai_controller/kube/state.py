"""What the operator holds of Tasks and Pods: as little as a look needs, whichever way it was told.

A Task that is not finished is kept as the JSON it came as; of a finished one only when it ended. Of a Pod the Run that it is,
and what deleting it takes. The newer version stays, so a late event or a list changes nothing back.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import inf
from typing import Any

import orjson

from cloudai.clock import now_ms
from cloudai.resources import Run, TaskStatus
from cloudai.store.kube.pods import FINALIZER, attempt_of, owner_of, run_of
from cloudai.store.kube.task_resource import PHASES, SUBMITTED, Json, millis

REMEMBERED = 10_000  # deleted objects, the last ones: more than are deleted while one answer is on its way

_TERMINAL = frozenset(PHASES[status] for status in TaskStatus if status.terminal)


@dataclass(frozen=True, slots=True)
class SeenTask:
    """`document`: the resource as JSON; None for a finished Task without live Pods to look after. `edited`: its wish is newer
    than what the status was written for.
    """

    uid: str
    version: int
    document: bytes | None
    finished_at: int | None
    queued: bool = False
    edited: bool = False

    def resource(self) -> Json:
        assert self.document is not None
        resource: Json = orjson.loads(self.document)
        return resource


@dataclass(frozen=True, slots=True)
class SeenPod:
    """A Pod that says to be an attempt. `owner`: the uid of the Task it was made for, which another one of the same name
    is not. `finalizers` and `version` are what letting it go takes.
    """

    uid: str
    owner: str
    version: int
    run: Run
    finalizers: tuple[str, ...]
    deleting: bool

    @property
    def held(self) -> bool:
        """Whether our finalizer keeps it."""
        return FINALIZER in self.finalizers


def seen_task(resource: Mapping[str, Any]) -> SeenTask:
    """What is kept of a Task as the API server gives it. An end without its time, which somebody else wrote, is as of now."""
    meta = resource["metadata"]
    status = resource.get("status") or {}
    phase = status.get("phase", PHASES[TaskStatus.QUEUED])
    finished = phase in _TERMINAL
    slim: Json = {name: resource.get(name) for name in ("apiVersion", "kind", "spec", "status")}
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
    if SUBMITTED in (meta.get("annotations") or {}):
        slim["metadata"]["annotations"] = {SUBMITTED: meta["annotations"][SUBMITTED]}
    return SeenTask(
        meta["uid"],
        int(meta["resourceVersion"]),
        orjson.dumps(slim),
        (millis(status.get("finishedAt")) or now_ms()) if finished else None,
        phase == PHASES[TaskStatus.QUEUED],
        meta.get("generation") != status.get("observedGeneration"),
    )


def seen_pod(pod: Mapping[str, Any]) -> SeenPod:
    """What is kept of a Pod with an `attempt_of`."""
    meta = pod["metadata"]
    return SeenPod(
        meta["uid"],
        owner_of(pod),
        int(meta["resourceVersion"]),
        run_of(pod),
        tuple(meta.get("finalizers") or ()),
        meta.get("deletionTimestamp") is not None,
    )


class Memory:
    """Tasks by name, and Pods by the name of the Task they say to be of. `put_` and `drop_` return whether that changed
    anything: a late event, an old list or an answer that was on its way brings nothing back.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, SeenTask] = {}
        self.pods: defaultdict[str, dict[str, SeenPod]] = defaultdict(dict)
        self._gone: OrderedDict[str, float] = OrderedDict()  # uids of what was deleted, and in which version

    def put_task(self, resource: Mapping[str, Any]) -> bool:
        """The Task as it is now."""
        name = resource["metadata"]["name"]
        if not self._is_news(resource, self.tasks.get(name)):
            return False
        self.tasks[name] = seen_task(resource)
        return True

    def drop_task(self, name: str, uid: str, version: float = inf) -> bool:
        """The Task is gone; by that version, where it only went out of sight."""
        self._deleted(uid, version)
        if name not in self.tasks or self.tasks[name].uid != uid:
            return False
        del self.tasks[name]
        return True

    def put_pod(self, pod: Mapping[str, Any]) -> bool:
        """The Pod as it is now; one that is no attempt is left out."""
        attempt = attempt_of(pod)
        if attempt is None:
            return False
        (task, _), name = attempt, pod["metadata"]["name"]
        if not self._is_news(pod, self.pods[task].get(name) if task in self.pods else None):
            return False
        self.pods[task][name] = seen_pod(pod)
        return True

    def drop_pod(self, task: str, name: str, uid: str, version: float = inf) -> bool:
        """The Pod is gone; by that version, where it only went out of sight: somebody may put its labels back."""
        self._deleted(uid, version)
        known = self.pods.get(task, {})
        if name not in known or known[name].uid != uid:
            return False
        del known[name]
        if not known:
            del self.pods[task]
        return True

    def queued(self) -> int:
        """How many Tasks wait for a node."""
        return sum(task.queued for task in self.tasks.values())

    def pods_of(self, task: str) -> dict[str, SeenPod]:
        """By name, those that say to be of that Task."""
        return dict(self.pods.get(task, {}))

    def knows(self, pod: SeenPod) -> bool:
        """Whether that very Pod is there, whatever became of it."""
        known = self.pods.get(pod.run.task_id, {}).get(pod.run.run_id)
        return known is not None and known.uid == pod.uid

    def settle(self, name: str) -> None:
        """Nothing more is to be decided of a finished Task: forget all but when it goes."""
        task = self.tasks.get(name)
        if task is not None and task.finished_at is not None:
            self.tasks[name] = SeenTask(task.uid, task.version, None, task.finished_at)

    def _is_news(self, now: Mapping[str, Any], before: SeenTask | SeenPod | None) -> bool:
        meta = now["metadata"]
        return int(meta["resourceVersion"]) > max(
            self._gone.get(meta["uid"], 0), 0 if before is None else before.version
        )

    def _deleted(self, uid: str, version: float) -> None:
        self._gone[uid] = version
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def only_tasks(self, names: Set[str], version: int) -> set[str]:
        """Forget the Tasks that a whole list of that version has not; returns their names."""
        gone = {name for name, task in self.tasks.items() if name not in names and task.version <= version}
        for name in gone:
            self.drop_task(name, self.tasks[name].uid, version)
        return gone

    def only_pods(self, names: Set[str], version: int) -> set[str]:
        """The same of Pods; returns the names of their Tasks."""
        known = [(task, name, pod) for task, pods in self.pods.items() for name, pod in pods.items()]
        gone = [(task, name, pod) for task, name, pod in known if name not in names and pod.version <= version]
        for task, name, pod in gone:
            self.drop_pod(task, name, pod.uid, version)
        return {task for task, _, _ in gone}
