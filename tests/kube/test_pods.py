"""What is made of a Pod, and what is remembered of Pods and Tasks. Without a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from cloudai.clock import now_ms
from cloudai.resources import NOTHING, Reason, Resources, RunPhase
from cloudai.store.kube import quantity
from cloudai.store.kube.pods import GPU, attempt_of, held, over, run_of
from cloudai.store.kube.task_resource import SUBMITTED, status_of, task_of
from cloudai_controller.kube.pod import PodTerms, pod_of
from cloudai_controller.kube.refusal import refusal
from cloudai_controller.kube.state import Memory, seen_task

Json = dict[str, Any]
META = {"creationTimestamp": "2025-11-16T10:30:00Z", "resourceVersion": "5"}
LABELS = {"cloudai.dev/task": "t", "cloudai.dev/attempt": "1"}


def pod(status: Json, *, name: str = "t-1", version: int = 5, uid: str = "pod", **meta: Any) -> Json:
    base: Json = {"name": name, "namespace": "here", "uid": uid, "labels": LABELS, "resourceVersion": str(version)}
    owner = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "task", "controller": True}
    base |= {"creationTimestamp": "2025-11-16T10:30:00Z", "ownerReferences": [owner], **meta}
    spec = {"nodeName": "node", "containers": [{"name": "task", "image": "i", "resources": {"requests": {"cpu": "1"}}}]}
    return {"metadata": base, "spec": spec, "status": status}


def ended(status: Json, **state: Any) -> tuple[RunPhase, str | None]:
    container = {"containerStatuses": [{"name": "task", "state": {"terminated": state}}]} if state else {}
    run = run_of(pod({"phase": "Failed", **status, **container}))
    return run.phase, run.reason


def target(kind: str, reason: str) -> Json:
    return {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": "why"}]}


PRESSURE = (
    "The node was low on resource: ephemeral-storage. Container task has larger consumption of ephemeral-storage."
)
LIMIT = "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi. "


@pytest.mark.parametrize(
    ("status", "state", "end"),
    [
        ({"reason": "Evicted", "message": LIMIT}, {}, (RunPhase.FAILED, Reason.STORAGE_LIMIT_EXCEEDED)),
        ({"reason": "Evicted", "message": PRESSURE}, {}, (RunPhase.LOST, Reason.EVICTED)),
        ({"reason": "OutOfcpu", "message": "not enough"}, {}, (RunPhase.LOST, Reason.EVICTED)),
        ({"reason": "UnexpectedAdmissionError"}, {}, (RunPhase.LOST, Reason.EVICTED)),
        ({"reason": "DeadlineExceeded"}, {}, (RunPhase.FAILED, Reason.DEADLINE_EXCEEDED)),
        (target("DisruptionTarget", "DeletionByPodGC"), {}, (RunPhase.LOST, Reason.WORKER_LOST)),
        (target("TerminationTarget", "Preempted"), {"exitCode": 143}, (RunPhase.LOST, Reason.PREEMPTED)),
        ({}, {"exitCode": 137, "reason": "ContainerStatusUnknown"}, (RunPhase.LOST, Reason.WORKER_LOST)),
        ({}, {"exitCode": 255, "reason": "Unknown"}, (RunPhase.LOST, Reason.WORKER_LOST)),
        ({}, {"exitCode": 137, "reason": "OOMKilled"}, (RunPhase.FAILED, Reason.OOM_KILLED)),
        ({}, {"exitCode": 3, "reason": "Error"}, (RunPhase.FAILED, Reason.EXIT_CODE)),
    ],
)
def test_an_end_is_the_tasks_own_or_the_loss_of_its_place(status: Json, state: Json, end: object) -> None:
    assert ended(status, **state) == end


def test_a_pod_that_is_being_deleted_is_over_when_the_kubelet_says_so() -> None:
    running: Json = {"phase": "Running", "containerStatuses": [{"name": "task", "state": {"running": {}}}]}
    going: Json = {"deletionTimestamp": "2025-11-16T10:30:00Z"}
    assert not over(pod(running, **going | {"deletionGracePeriodSeconds": 1}))
    assert over(pod(running, **going | {"deletionGracePeriodSeconds": 0}))


@pytest.mark.parametrize(
    ("finished", "reason"),
    [
        ("2025-11-16T10:29:59Z", Reason.EXIT_CODE),  # deleted thereafter
        ("2025-11-16T10:30:00Z", Reason.CONTAINER_GONE),
        ("2025-11-16T10:30:09Z", Reason.CONTAINER_GONE),
        (None, Reason.CONTAINER_GONE),
    ],
)
def test_a_command_that_ended_before_its_pod_was_deleted_ended_by_itself(finished: str | None, reason: Reason) -> None:
    state = {"exitCode": 3, "reason": "Error", "startedAt": "2025-11-16T10:29:00Z"} | (
        {} if finished is None else {"finishedAt": finished}
    )
    status = {"phase": "Failed", "containerStatuses": [{"name": "task", "state": {"terminated": state}}]}
    run = run_of(pod(status, deletionTimestamp="2025-11-16T10:30:30Z", deletionGracePeriodSeconds=30))
    assert (run.phase, run.reason, run.exit_code) == (RunPhase.FAILED, reason, 3)


@pytest.mark.parametrize(
    ("code", "reason"), [(3, Reason.EXIT_CODE), (137, Reason.CONTAINER_GONE), (143, Reason.CONTAINER_GONE)]
)
def test_once_the_kubelet_is_done_a_signal_is_taken_for_the_deletions(code: int, reason: Reason) -> None:
    times = {"startedAt": "2025-11-16T10:29:00Z", "finishedAt": "2025-11-16T10:30:00Z"}
    state = {"exitCode": code, "reason": "Error"} | times
    status = {"phase": "Failed", "containerStatuses": [{"name": "task", "state": {"terminated": state}}]}
    run = run_of(pod(status, deletionTimestamp="2025-11-16T10:30:02Z", deletionGracePeriodSeconds=0))
    assert (run.phase, run.reason, run.exit_code) == (RunPhase.FAILED, reason, code)


def test_a_container_that_never_started_has_no_exit_code() -> None:
    state = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None, "finishedAt": None}}
    run = run_of(pod({"phase": "Failed", "containerStatuses": [{"name": "task", "state": state}]}))
    assert (run.phase, run.started_at, run.exit_code) == (RunPhase.LOST, None, None)


@pytest.mark.parametrize(
    ("wish", "settings", "context"),
    [
        ({}, None, {}),
        ({}, 1000, {"runAsNonRoot": True, "runAsUser": 1000}),
        ({"runAsUser": 2000}, 1000, {"runAsNonRoot": True, "runAsUser": 2000}),
        ({"runAsUser": 0}, 1000, {"runAsUser": 0}),
        ({"runAsUser": 2000, "runAsNonRoot": False}, None, {"runAsNonRoot": False, "runAsUser": 2000}),
        ({"fsGroup": 5}, 1000, {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 5}),
    ],
)
def test_a_user_that_is_not_root_is_said_to_be_so(wish: Json, settings: int | None, context: Json) -> None:
    spec = {"image": "i", "resources": {"cpu": "1", "memory": "1Gi"}, "pod": {"securityContext": wish}}
    resource = {"metadata": {"name": "t", "namespace": "here", "uid": "u"} | META, "spec": spec}
    made = pod_of(resource, task_of(resource), 1, PodTerms(30, GPU, settings))
    assert made["spec"]["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}} | context


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("t-2", LABELS),
        ("t-1", {"cloudai.dev/task": "t"}),
        ("t-x", {"cloudai.dev/task": "t", "cloudai.dev/attempt": "x"}),
        ("t-²", {"cloudai.dev/task": "t", "cloudai.dev/attempt": "²"}),
        ("t-1", {}),
    ],
)
def test_labels_that_the_name_does_not_confirm_make_no_attempt(name: str, labels: Json) -> None:
    odd = pod({}, name=name) | {}
    odd["metadata"]["labels"] = labels
    assert attempt_of(odd) is None
    assert held(odd, GPU, "here").run is None
    assert held(odd, GPU, "here").amount == Resources(1000, 0, 0, 0)
    assert not Memory().put_pod(odd)


def test_attempts_are_those_of_the_namespace_of_the_tasks() -> None:
    assert held(pod({}), GPU, "here").run is not None
    assert held(pod({}), GPU, "elsewhere").run is None
    assert held(pod({"phase": "Failed"}), GPU, "here").amount == NOTHING


def task(uid: str, version: int, phase: str = "Queued") -> Json:
    meta = {"name": "t", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {}, "status": {"phase": phase}}


def test_what_is_remembered_of_a_task_is_the_same_task() -> None:
    spec = {"image": "i", "resources": {"cpu": "1", "memory": "1Gi"}}
    submitted = {SUBMITTED: "1763289000500", "other": "x" * 1000}
    whole: Json = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "spec": spec}
    meta = {"creationTimestamp": "2025-11-16T10:30:00Z", "namespace": "here", "annotations": submitted}
    whole["metadata"] = {"name": "t", "uid": "one", "resourceVersion": "5", **meta}
    kept = seen_task(whole)
    assert task_of(kept.resource()) == task_of(whole)
    assert task_of(whole).created_at == 1763289000500


def test_an_end_that_nobody_timed_is_no_old_one() -> None:
    before = now_ms()
    found = seen_task(task("one", 5, "Completed"))
    assert found.finished_at is not None
    assert before <= found.finished_at <= now_ms()


@pytest.mark.parametrize(
    ("phase", "asked", "expected"),
    [
        ("Running", False, {"Succeeded": "Unknown"}),
        ("Running", True, {"Succeeded": "Unknown", "Cancelled": "False"}),
        ("Completed", True, {"Succeeded": "True", "Cancelled": "False"}),
        ("Cancelled", True, {"Succeeded": "False", "Cancelled": "True"}),
    ],
)
def test_a_status_has_the_conditions_that_tell_something(phase: str, asked: bool, expected: dict[str, str]) -> None:
    told = task("one", 5)
    told["spec"] = {"image": "busybox", "resources": {"cpu": "1", "memory": "1Gi"}, "cancelRequested": asked}
    told["metadata"] |= {"namespace": "here", "creationTimestamp": "2025-11-16T10:30:00Z"}
    told["status"] = {"phase": phase, "node": "node", "startedAt": "2025-11-16T10:30:01.000Z"}
    first = status_of(task_of(told), [], {}, 1, 1000)
    assert {one["type"]: one["status"] for one in first["conditions"]} == {
        "Scheduled": "True",
        "Started": "True",
        **expected,
    }
    later = status_of(task_of(told), [], first, 1, 9000)
    assert later == first  # the times are those of the last change


def test_an_old_list_changes_nothing_back() -> None:
    memory = Memory()
    assert memory.put_task(task("one", 5))
    assert memory.put_task(task("one", 9))
    assert not memory.put_task(task("one", 7))
    assert memory.only_tasks(set(), version=8) == set()  # told of since


def test_a_pod_that_gets_its_labels_back_is_known_again() -> None:
    memory = Memory()
    memory.put_pod(pod({}, version=5))
    assert memory.drop_pod("t", "t-1", "pod", 6)  # of such a one the watch says that it was deleted
    assert not memory.put_pod(pod({}, version=5))
    assert memory.put_pod(pod({}, version=7))
    assert memory.only_pods(set(), version=8) == {"t"}
    assert not memory.put_pod(pod({}, version=8))
    assert memory.put_pod(pod({}, version=9))


@pytest.mark.parametrize("told", [True, False])
def test_what_is_gone_does_not_come_back_with_an_answer_that_was_on_its_way(told: bool) -> None:
    memory = Memory()
    if told:  # of them while they were there
        memory.put_task(task("one", 5))
        memory.put_pod(pod({}, version=5))
    assert memory.drop_task("t", "one") is told
    assert memory.drop_pod("t", "t-1", "pod") is told
    assert not memory.put_task(task("one", 7))
    assert not memory.put_pod(pod({}, version=7))
    assert (memory.tasks, memory.pods_of("t")) == ({}, {})
    assert memory.put_task(task("another", 8))


def test_what_a_newer_list_has_not_is_gone() -> None:
    memory = Memory()
    memory.put_task(task("one", 5))
    memory.put_pod(pod({}, version=5))
    assert memory.only_tasks(set(), version=6) == {"t"}
    assert memory.only_pods({"t-1"}, version=6) == set()
    assert memory.only_pods(set(), version=4) == set()
    assert memory.only_pods(set(), version=6) == {"t"}
    assert not memory.pods_of("t")


@pytest.mark.parametrize(
    ("words", "amount"),
    [("1e1000", quantity.LARGEST), ("1e-1000", 1), ("5E", 5 * 10**18), ("9999E", quantity.LARGEST), ("0.5", 1)],
)
def test_a_quantity_of_any_size_is_a_number(words: str, amount: int) -> None:
    assert quantity.whole(words) == amount


@pytest.mark.parametrize(
    ("status", "words", "reason", "final"),
    [
        (403, "exceeded quota: q", Reason.QUOTA_EXCEEDED, False),
        (403, "status unknown for quota: q, resources: pods", Reason.WAITING_FOR_ADMISSION, False),
        (500, 'Internal error occurred: failed calling webhook "k"', Reason.WAITING_FOR_ADMISSION, False),
        (403, "violates PodSecurity", Reason.POD_REFUSED, True),
        (400, 'admission webhook "p" denied the request', Reason.POD_REFUSED, True),
        (401, "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no", Reason.POD_REFUSED, True),
        (404, 'admission webhook "p" denied the request: no', Reason.POD_REFUSED, True),
        (500, 'admission webhook "p" denied the request: not now', Reason.WAITING_FOR_ADMISSION, False),
    ],
)
def test_a_refusal_waits_or_fails(status: int, words: str, reason: Reason, final: bool) -> None:
    found = refusal(status, words)
    assert found is not None
    assert (found.reason, found.final) == (reason, final)


def test_a_refusal_of_ours_or_of_the_server_is_a_fault() -> None:
    assert refusal(403, 'pods is forbidden: User "x" cannot create resource "pods"') is None
    assert refusal(500, "etcdserver: request timed out") is None
