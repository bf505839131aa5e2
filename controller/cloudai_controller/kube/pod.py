"""The Pod that an attempt of a Task is. Pure: everything about it follows from the Task's resource and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudai.resources import Task, run_id
from cloudai.store.kube import quantity
from cloudai.store.kube.pods import CONTAINER, FINALIZER
from cloudai.store.kube.task_resource import API_VERSION, ATTEMPT_LABEL, KIND, TASK_LABEL, Json

UNREACHABLE_SECONDS = 300  # Kubernetes' own default, written out: how long a silent node keeps its Pods
_COPIED = (
    "nodeSelector",
    "tolerations",
    "imagePullSecrets",
    "priorityClassName",
    "runtimeClassName",
    "serviceAccountName",
)


@dataclass(frozen=True, slots=True)
class PodTerms:
    """What the operator's settings say of every Pod."""

    grace_seconds: int
    gpu_resource: str
    run_as_user: int | None = None


def pod_of(resource: Mapping[str, Any], task: Task, attempt: int, terms: PodTerms) -> Json:
    """The manifest of attempt number `attempt`."""
    meta, wish = resource["metadata"], resource["spec"].get("pod") or {}
    labels = {**(wish.get("labels") or {}), TASK_LABEL: task.task_id, ATTEMPT_LABEL: str(attempt)}
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
    }
    spec: Json = {
        "containers": [_container(task, attempt, terms)],
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": terms.grace_seconds,
        "securityContext": {
            "seccompProfile": {"type": "RuntimeDefault"},
            **_user(wish.get("securityContext") or {}, terms),
        },
        **{name: wish[name] for name in _COPIED if name in wish},
    }
    spec["tolerations"] = [*(wish.get("tolerations") or []), *_patience()]
    if task.spec.timeout_seconds is not None:
        spec["activeDeadlineSeconds"] = task.spec.timeout_seconds
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": run_id(task.task_id, attempt),
            "namespace": meta["namespace"],
            "labels": labels,
            **({"annotations": wish["annotations"]} if wish.get("annotations") else {}),
            "ownerReferences": [owner],
            "finalizers": [FINALIZER],
        },
        "spec": spec,
    }


def _container(task: Task, attempt: int, terms: PodTerms) -> Json:
    wish = task.spec.resources
    amounts = {"cpu": quantity.of_milli(wish.cpu), "memory": quantity.of_bytes(wish.memory)}
    if wish.storage:
        amounts["ephemeral-storage"] = quantity.of_bytes(wish.storage)
    if wish.gpu:
        amounts[terms.gpu_resource] = str(wish.gpu // 1000)
    container: Json = {
        "name": CONTAINER,
        "image": task.spec.image,
        "resources": {"requests": amounts, "limits": amounts},
        "env": [
            {"name": "CLOUDAI_TASK_ID", "value": task.task_id},
            {"name": "CLOUDAI_ATTEMPT", "value": str(attempt)},
        ],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    command = task.spec.command
    if command is not None:
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        # Kubernetes would put variables in place of $(NAME), and one $ in that of $$:
        # https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container/
        container["command"] = [word.replace("$", "$$") for word in words]
    return container


def _user(wish: Mapping[str, Any], terms: PodTerms) -> Json:
    """What the Task says of its user; where it names none, the one of the settings. One that is not root is said to be so,
    which a restricted namespace wants to hear.
    """
    user = wish.get("runAsUser", terms.run_as_user)
    if user is None:
        return dict(wish)
    return ({"runAsNonRoot": True} if user else {}) | {"runAsUser": user, **wish}


def _patience() -> list[Json]:
    kinds = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    return [
        {"key": kind, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNREACHABLE_SECONDS}
        for kind in kinds
    ]
