"""A Pod as a Run: what Kubernetes says of an attempt, in the words that everything else is decided with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudai.resources import NOTHING, Reason, Resources, Run, RunPhase
from cloudai.store.kube import quantity
from cloudai.store.kube.task_resource import ATTEMPT_LABEL, GROUP, KIND, TASK_LABEL, millis

CONTAINER = "task"
FINALIZER = "cloudai.dev/evidence"  # holds a Pod until its end and its log are kept
GPU = "nvidia.com/gpu"

# What a container that waits can only be helped with by another spec.
_HOPELESS: Mapping[str, Reason] = {
    "InvalidImageName": Reason.INVALID_IMAGE_NAME,
    "ErrImageNeverPull": Reason.IMAGE_NOT_FOUND,
    "CreateContainerConfigError": Reason.START_FAILED,
}
_PULLING = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"})
_NOT_FOUND = ("not found", "does not exist", "manifest unknown", "repository does not exist")
# Why a disruption ended the Pod: https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
_DISRUPTIONS: Mapping[str, Reason] = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "EvictionByEvictionAPI": Reason.EVICTED,
    "TerminationByKubelet": Reason.EVICTED,
    "DeletionByTaintManager": Reason.WORKER_LOST,
    "DeletionByPodGC": Reason.WORKER_LOST,
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a Pod of anybody's holds of a node; `run` when it is an attempt of ours, and `owner` the uid of its Task.

    `log_over`: no byte will follow in its log. `log_due`: the log is still to be kept.
    """

    node: str | None
    amount: Resources
    run: Run | None
    owner: str = ""
    log_over: bool = False
    log_due: bool = False


def held(pod: Mapping[str, Any], gpu: str, namespace: str) -> Held:
    """`amount` is nothing once the Pod is over. `namespace`: where attempts of ours are."""
    ours = pod["metadata"]["namespace"] == namespace and attempt_of(pod) is not None
    amount, node = (NOTHING if over(pod) else requests_of(pod, gpu)), pod["spec"].get("nodeName")
    if not ours:
        return Held(node, amount, None)
    ended = bool((_container(pod.get("status") or {}).get("state") or {}).get("terminated"))
    log_due = FINALIZER in (pod["metadata"].get("finalizers") or ())
    return Held(node, amount, run_of(pod, amount), owner_of(pod), ended or over(pod), log_due)


def attempt_of(pod: Mapping[str, Any]) -> tuple[str, int] | None:
    """The Task's name and the number of the attempt that a Pod says to be; None for a Pod of another kind.

    Anybody may write our labels on a Pod: what its name does not confirm is none of ours.
    """
    labels = pod["metadata"].get("labels") or {}
    task, number = labels.get(TASK_LABEL), labels.get(ATTEMPT_LABEL, "")
    if task is None or not number.isascii() or not number.isdecimal() or len(number) > 4:
        return None
    return (task, int(number)) if pod["metadata"]["name"] == f"{task}-{int(number)}" else None


def owner_of(pod: Mapping[str, Any]) -> str:
    """The uid of the Task that the Pod was made for; empty for none."""
    for one in pod["metadata"].get("ownerReferences") or []:
        if one.get("controller") and one["kind"] == KIND and one["apiVersion"].partition("/")[0] == GROUP:
            return str(one["uid"])
    return ""


def over(pod: Mapping[str, Any]) -> bool:
    """No container of it lives or will: it ended, or Kubernetes would have removed it but for our finalizer.

    The kubelet ends its part of a deletion with a grace of 0, as does whoever gives up a node.
    """
    meta, phase = pod["metadata"], (pod.get("status") or {}).get("phase")
    deleted = meta.get("deletionTimestamp") is not None
    never_taken = not pod["spec"].get("nodeName")
    return phase in ("Succeeded", "Failed") or (
        deleted and (never_taken or meta.get("deletionGracePeriodSeconds") == 0)
    )


def run_of(pod: Mapping[str, Any], resources: Resources = NOTHING) -> Run:
    """The attempt that a Pod of ours is: one with an `attempt_of`. `resources`: where it matters what it holds."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    task_id, attempt = attempt_of(pod) or ("", 0)
    container = _container(status)
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    began = (state.get("running") or {}).get("startedAt") or ended.get("startedAt")
    phase, reason, message = _phase(pod, status, state)
    # A container that could not be started has the epoch as its start, and no exit code of its own.
    started_at = None if began is None or began.startswith("1970-") else millis(began)
    return Run(
        task_id=task_id,
        attempt=attempt,
        worker_id=spec.get("nodeName") or "",
        user_id="",  # the Task says it
        image=_image(pod),
        command=None,
        resources=resources,
        created_at=millis(status.get("startTime") or meta["creationTimestamp"]) or 0,
        stop_requested=meta.get("deletionTimestamp") is not None,
        phase=phase,
        started_at=started_at,
        finished_at=millis(ended.get("finishedAt")) if phase.terminal else None,
        exit_code=ended.get("exitCode") if phase.terminal and started_at is not None else None,
        reason=reason,
        message=message,
        version=int(meta["resourceVersion"]),
    )


def _image(pod: Mapping[str, Any]) -> str:
    """Of the task's own container: a webhook may have added others."""
    return next((str(one["image"]) for one in pod["spec"]["containers"] if one["name"] == CONTAINER), "")


def _container(status: Mapping[str, Any]) -> Mapping[str, Any]:
    for one in status.get("containerStatuses") or []:
        if one["name"] == CONTAINER:
            return one  # type: ignore[no-any-return]
    return {}


SIGNALS = (137, 143)  # exit codes after KILL and TERM

_Said = tuple[RunPhase, str | None, str | None]


def _phase(pod: Mapping[str, Any], status: Mapping[str, Any], state: Mapping[str, Any]) -> _Said:
    if over(pod):
        return _ended(pod, status, state.get("terminated") or {})
    lost = _condition(status, "DisruptionTarget")
    if lost.get("status") == "True" and lost.get("reason") == "DeletionByTaintManager":
        node = pod["spec"].get("nodeName")
        words = f"Node {node} does not answer or may not keep it; waits until Kubernetes is sure that the Pod is gone."
        return (RunPhase.RUNNING if state.get("running") else RunPhase.ASSIGNED), Reason.WORKER_INACTIVE, words
    if state.get("running") or state.get("terminated"):
        return RunPhase.RUNNING, None, None
    if not pod["spec"].get("nodeName"):
        return RunPhase.ASSIGNED, *_unplaced(status)
    return _waiting(pod, state.get("waiting") or {})


def _unplaced(status: Mapping[str, Any]) -> tuple[str, str]:
    scheduled = _condition(status, "PodScheduled")
    match scheduled.get("reason"):
        case "Unschedulable":
            return Reason.UNSCHEDULABLE, f"The scheduler says: {scheduled.get('message', '')}"
        case "SchedulingGated":
            return Reason.WAITING_FOR_ADMISSION, "Its Pod is gated: a queue such as Kueue's has not admitted it yet."
        case _:
            return Reason.WAITING_FOR_CAPACITY, "Waits for the scheduler."


def _waiting(pod: Mapping[str, Any], waiting: Mapping[str, Any]) -> _Said:
    why, words = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    image = _image(pod)
    if why in _HOPELESS:
        return RunPhase.STARTING, _HOPELESS[why], f"The node cannot start it: {words or why}"
    if why == "CreateContainerError":  # of a busy runtime, too, which the kubelet tries again
        return RunPhase.PULLING, Reason.START_FAILED, f"The node cannot start it yet: {words or why}"
    if why in _PULLING:
        missing = any(sign in words.lower() for sign in _NOT_FOUND)
        reason = Reason.IMAGE_NOT_FOUND if missing else Reason.IMAGE_PULL_FAILED
        return RunPhase.PULLING, reason, f"{image} could not be fetched: {words or why}"
    if _condition(pod.get("status") or {}, "PodReadyToStartContainers").get("status") == "False":
        name, node = pod["metadata"]["name"], pod["spec"]["nodeName"]
        words = f"Node {node} has not made a place for it yet; it tries on, and `kubectl describe pod {name}` says why."
        return RunPhase.ASSIGNED, None, words
    return RunPhase.ASSIGNED, None, None


def _ended(pod: Mapping[str, Any], status: Mapping[str, Any], ended: Mapping[str, Any]) -> _Said:
    meta = pod["metadata"]
    disruption, termination = _condition(status, "DisruptionTarget"), _condition(status, "TerminationTarget")
    words = str(status.get("message") or disruption.get("message") or "").strip()
    if status.get("phase") == "Succeeded":
        return RunPhase.SUCCEEDED, None, None
    if status.get("reason") == "DeadlineExceeded":
        return RunPhase.FAILED, Reason.DEADLINE_EXCEEDED, "It ran longer than its timeout."
    if status.get("reason") == "Evicted" and "exceed" in words.lower():  # its own limit; else the node is short
        return RunPhase.FAILED, Reason.STORAGE_LIMIT_EXCEEDED, f"It wrote more than its storage: {words}"
    if disruption.get("status") == "True" and disruption.get("reason") in _DISRUPTIONS:
        node = pod["spec"].get("nodeName")
        return RunPhase.LOST, _DISRUPTIONS[disruption["reason"]], f"Kubernetes ended it on node {node}: {words}"
    if status.get("reason") in ("Evicted", "NodeShutdown", "Terminated", "NodeLost"):
        return RunPhase.LOST, Reason.EVICTED, f"Node {pod['spec'].get('nodeName')} ended it: {words}"
    if termination.get("status") == "True":  # Kueue's word for a Pod whose place it gives to another
        return RunPhase.LOST, Reason.PREEMPTED, f"Kubernetes ended it: {termination.get('message') or words}"
    if ended.get("reason") == "OOMKilled":
        return RunPhase.FAILED, Reason.OOM_KILLED, "It needed more memory than it asked for."
    if ended.get("reason") == "StartError":
        return RunPhase.FAILED, *_start_error(str(ended.get("message") or ""))
    if meta.get("deletionTimestamp") is not None and not _ended_before(meta, ended):
        return RunPhase.FAILED, Reason.CONTAINER_GONE, "Its Pod was deleted."
    if ended.get("reason") in ("ContainerStatusUnknown", "Unknown"):
        node = pod["spec"].get("nodeName")
        return RunPhase.LOST, Reason.WORKER_LOST, f"Node {node} has restarted and cannot tell how it ended."
    if "exitCode" in ended:
        return RunPhase.FAILED, Reason.EXIT_CODE, f"The command ended with exit code {ended['exitCode']}; see the logs."
    why = words or status.get("reason") or "it says no more"
    return RunPhase.LOST, Reason.EVICTED, f"Node {pod['spec'].get('nodeName')} did not take it: {why}"


def _ended_before(meta: Mapping[str, Any], ended: Mapping[str, Any]) -> bool:
    """Whether the command had ended when the deletion was asked for, which is its grace before what Kubernetes tells. Once
    the kubelet has done its part it tells when that was instead: then a signal is taken for the deletion's.
    """
    finished, deleted = millis(ended.get("finishedAt")), millis(meta["deletionTimestamp"])
    grace = 1000 * int(meta.get("deletionGracePeriodSeconds") or 0)
    if finished is None or deleted is None:
        return False
    return finished < deleted - grace if grace else ended.get("exitCode") not in SIGNALS


def _start_error(words: str) -> tuple[Reason, str]:
    if "executable file not found" in words or "no such file or directory" in words:
        return Reason.COMMAND_NOT_FOUND, f"The image has no such program: {words}"
    return Reason.START_FAILED, f"The container could not be started: {words}"


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    for condition in status.get("conditions") or []:
        if condition["type"] == kind:
            return condition  # type: ignore[no-any-return]
    return {}


def requests_of(pod: Mapping[str, Any], gpu: str = GPU) -> Resources:
    """What the scheduler counts: the containers' sum, or the largest that runs before them, plus overhead.

    https://kubernetes.io/docs/concepts/workloads/pods/init-containers/#resource-sharing-within-containers
    """
    spec = pod["spec"]
    steady, start = NOTHING, NOTHING
    for one in spec.get("initContainers") or []:
        if one.get("restartPolicy") == "Always":  # a sidecar, which goes on
            steady += amount_of(_requests(one), gpu)
            start = _larger(start, steady)
        else:
            start = _larger(start, steady + amount_of(_requests(one), gpu))
    steady = sum((amount_of(_requests(one), gpu) for one in spec.get("containers") or []), steady)
    own = (spec.get("resources") or {}).get("requests") or {}
    return _replaced(_larger(start, steady), own, gpu) + amount_of(spec.get("overhead") or {}, gpu)


def _requests(container: Mapping[str, Any]) -> Mapping[str, Any]:
    resources = container.get("resources") or {}
    return (resources.get("limits") or {}) | (resources.get("requests") or {})


def amount_of(amounts: Mapping[str, Any], gpu: str) -> Resources:
    """What Kubernetes' quantities by name (requests, allocatable) are; `gpu` is the name of a GPU there."""
    return Resources(
        quantity.milli(amounts.get("cpu", 0)),
        quantity.whole(amounts.get("memory", 0)),
        quantity.whole(amounts.get("ephemeral-storage", 0)),
        1000 * quantity.whole(amounts.get(gpu, 0)),
    )


def _replaced(amount: Resources, own: Mapping[str, Any], gpu: str) -> Resources:
    """Requests of the Pod as a whole take the place of its containers' sum."""
    wish = amount_of(own, gpu)
    return Resources(
        wish.cpu if "cpu" in own else amount.cpu,
        wish.memory if "memory" in own else amount.memory,
        amount.storage,
        amount.gpu,
    )


def _larger(one: Resources, other: Resources) -> Resources:
    return Resources(
        max(one.cpu, other.cpu),
        max(one.memory, other.memory),
        max(one.storage, other.storage),
        max(one.gpu, other.gpu),
    )
