"""A Task from `kubectl apply` to its end, in every way it can end, on a real node."""

from __future__ import annotations

import subprocess
import zlib
from base64 import b64decode
from typing import Any

import pytest

from cloudai.store.kube.task_resource import task_of
from cloudai_controller.kube.pod import PodTerms, pod_of
from tests.cluster.images import SHELL
from tests.kube.kube import Kube, Place, conditions, task

STUBBORN = "trap '' TERM; echo ready; while true; do sleep 0.1; done"


def log(place: Place, task: str) -> str:
    """What the archive keeps of a first attempt."""
    kept = place.get("configmap", place.log_of(task))
    return zlib.decompress(b64decode(kept["binaryData"]["log.zlib"])).decode()


def test_a_task_runs_once_and_is_told_of(shared: Place) -> None:
    name = shared.apply("echo out; echo err >&2")
    shared.kubectl("wait", "--for=condition=Succeeded", f"ctask/{name}", "--timeout=60s")
    found = shared.get("ctask", name)
    status = found["status"]
    assert (status["phase"], status["exitCode"], status["attempt"]) == ("Completed", 0, 1)
    assert status["node"] == shared.kube.node
    assert conditions(found) == {"Scheduled": "True", "Started": "True", "Succeeded": "True"}
    assert status["startedAt"] <= status["finishedAt"]
    shared.until_kept(name)
    assert sorted(log(shared, name).split()) == ["err", "out"]  # two pipes: their order is nobody's promise


def test_a_bad_end_has_its_exit_code_and_reason(shared: Place) -> None:
    found = shared.until(shared.apply("exit 3"), "Failed")
    assert (found["status"]["exitCode"], found["status"]["reason"]) == (3, "ExitCode")
    assert conditions(found)["Succeeded"] == "False"


def test_a_list_runs_as_given_and_without_a_command_the_image_decides(shared: Place) -> None:
    name = shared.apply(command=["echo", "a  b", "$HOME", "$$", "$(CLOUDAI_ATTEMPT)"])
    shared.until(name, "Completed")
    shared.until_kept(name)
    assert log(shared, name) == "a  b $HOME $$ $(CLOUDAI_ATTEMPT)\n"
    told = shared.apply("kill -0 $$ && echo $((1 + 1)) $CLOUDAI_ATTEMPT $(echo $$ | wc -l)")
    shared.until(told, "Completed")
    shared.until_kept(told)
    assert log(shared, told) == "2 1 1\n"
    assert shared.until(shared.apply(), "Completed")["status"]["exitCode"] == 0


def test_failures_are_tried_again_as_often_as_wished(shared: Place) -> None:
    found = shared.until(shared.apply("exit 1", maxRetries=2), "Failed")
    assert [one["exitCode"] for one in found["status"]["attempts"]] == [1, 1, 1]
    assert "attempt 3, the last" in found["status"]["message"]


def test_a_running_task_is_cancelled_even_if_it_ignores_that(shared: Place) -> None:
    name = shared.apply(STUBBORN)
    shared.until(name, "Running")
    shared.cancel(name)
    found = shared.until(name, "Cancelled")
    assert (found["status"]["exitCode"], found["status"]["reason"]) == (137, "Cancelled")
    assert conditions(found)["Cancelled"] == "True"
    shared.until_gone(f"pod/{name}-1")
    assert log(shared, name) == "ready\n"


def test_a_task_that_no_node_can_take_says_so_in_the_schedulers_words_and_can_be_cancelled(shared: Place) -> None:
    name = shared.apply("true", resources={"cpu": "1000", "memory": "1Gi"})
    found = shared.until_reason(name, "Unschedulable")
    assert found["status"]["phase"] == "Queued"
    assert "Insufficient cpu" in found["status"]["message"]
    assert conditions(found)["Scheduled"] == "False"
    shared.cancel(name)
    shared.until(name, "Cancelled")
    shared.until_gone(f"pod/{name}-1")


def test_a_task_whose_image_does_not_come_can_be_cancelled(place: Place) -> None:
    with place.operator(image_grace_seconds="1000"):
        name = place.apply(image="registry.invalid/nothing:1")
        place.until_reason(name, "ImagePullFailed")
        assert place.get("ctask", name)["status"]["phase"] == "Pending"
        place.cancel(name)
        assert place.until(name, "Cancelled")["status"].get("startedAt") is None
        place.until_gone(f"pod/{name}-1")


def test_a_cancel_at_any_instant_leaves_nothing_running(shared: Place) -> None:
    names = [shared.apply(STUBBORN) for _ in range(6)]
    for number, name in enumerate(names):
        # The first is cancelled wherever it is by now, the last as soon as it has a node.
        if number % 2:
            shared.kubectl("wait", f"pod/{name}-1", "--for=condition=PodScheduled", "--timeout=60s")
        shared.cancel(name)
    for name in names:
        shared.until(name, "Cancelled")
        shared.until_gone(f"pod/{name}-1")


def test_a_gated_pod_waits_for_its_queue(place: Place) -> None:
    """Kueue's webhook gates a Pod as it is made, and lifts the gate when its turn has come."""
    name = place.apply("true")
    resource = place.get("ctask", name)
    pod = pod_of(resource, task_of(resource), 1, PodTerms(2, "nvidia.com/gpu"))
    pod["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/admission"}]
    place.kubectl("create", "-f", "-", given=pod)
    with place.operator():
        found = place.until_reason(name, "WaitingForAdmission")
        assert found["status"]["phase"] == "Queued"
        assert "has not admitted it yet" in found["status"]["message"]
        place.kubectl("patch", "pod", f"{name}-1", "--type=merge", "-p", '{"spec": {"schedulingGates": null}}')
        assert place.until(name, "Completed")["status"]["attempt"] == 1


def test_a_task_that_takes_too_long_is_ended(shared: Place) -> None:
    found = shared.until(shared.apply("sleep 1000", timeoutSeconds=2), "Failed")
    assert found["status"]["reason"] == "DeadlineExceeded"


def test_a_task_that_takes_too_much_memory_is_ended(shared: Place) -> None:
    found = shared.until(
        shared.apply("head -c 200000000 /dev/zero | tail", resources={"cpu": "500m", "memory": "32Mi"}), "Failed"
    )
    assert (found["status"]["reason"], found["status"]["exitCode"]) == ("OOMKilled", 137)


def test_a_task_that_writes_too_much_is_ended(shared: Place) -> None:
    limits = {"cpu": "100m", "memory": "32Mi", "storage": "1Mi"}
    found = shared.until(shared.apply("head -c 9000000 /dev/zero > /big; sleep 1000", resources=limits), "Failed")
    assert found["status"]["reason"] == "StorageLimitExceeded"


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"image": "Not/A/Name"}, "InvalidImageName", "Not/A/Name"),
        ({"image": "registry.invalid/nothing:1"}, "ImagePullFailed", "registry.invalid/nothing:1"),
        ({"command": ["no-such-program"]}, "CommandNotFound", "no-such-program"),
    ],
    ids=["name", "pull", "program"],
)
def test_what_cannot_start_fails_with_its_reason_and_leaves_no_pod_that_tries_on(
    shared: Place, spec: dict[str, Any], reason: str, words: str
) -> None:
    name = shared.apply(**spec)
    found = shared.until(name, "Failed")
    assert found["status"]["reason"] == reason
    assert words in found["status"]["message"]
    if reason == "CommandNotFound":  # which ended by itself
        assert shared.get("pod", f"{name}-1")["status"]["phase"] == "Failed"
    else:
        shared.until_gone(f"pod/{name}-1")


def test_a_node_that_makes_no_place_for_a_pod_is_told_of(shared: Place) -> None:
    name = f"{shared.name}-none"
    known = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}, "handler": "none"}
    shared.kubectl("create", "-f", "-", given=known)
    try:
        waits = shared.apply("true", pod={"runtimeClassName": name})
        found = shared.until_reason(waits, "WaitingForNode")
        assert found["status"]["phase"] == "Pending"
        assert f"kubectl describe pod {waits}-1" in found["status"]["message"]
        shared.cancel(waits)
        found = shared.until(waits, "Cancelled")
        assert "exitCode" not in found["status"]
    finally:
        shared.kubectl("delete", "-f", "-", given=known)


def test_a_pod_deleted_by_hand_ends_its_task_with_what_it_said(shared: Place) -> None:
    name = shared.apply(STUBBORN)
    shared.until(name, "Running")
    shared.kubectl("delete", "pod", f"{name}-1", "--wait=false")
    found = shared.until(name, "Failed")
    assert (found["status"]["reason"], found["status"]["exitCode"]) == ("ContainerGone", 137)
    shared.until_gone(f"pod/{name}-1")
    assert log(shared, name) == "ready\n"


def test_an_evicted_task_is_tried_again(shared: Place) -> None:
    name = shared.apply(f"if [ $CLOUDAI_ATTEMPT = 1 ]; then {STUBBORN}; fi")
    shared.until(name, "Running")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": f"{name}-1"}}
    path = f"/api/v1/namespaces/{shared.name}/pods/{name}-1/eviction"
    shared.kubectl("create", "--raw", path, "-f", "-", given=eviction)
    found = shared.until(name, "Completed")
    assert [one["reason"] for one in found["status"]["attempts"] if "reason" in one] == ["Evicted"]
    assert found["status"]["attempt"] == 2


def test_a_deleted_task_is_stopped_and_leaves_nothing(shared: Place) -> None:
    name = shared.apply(STUBBORN)
    shared.until(name, "Running")
    shared.kubectl("delete", "ctask", name)
    shared.until_gone(f"pod/{name}-1")
    left = shared.get("pods,configmaps,ctask")["items"]
    assert [one["metadata"]["name"] for one in left if name in one["metadata"]["name"].split("-")] == []


def test_a_wish_after_the_end_is_seen_and_changes_nothing(shared: Place) -> None:
    name = shared.apply("true")
    shared.until(name, "Completed")
    shared.cancel(name)
    generation = shared.get("ctask", name)["metadata"]["generation"]
    shared.kubectl("wait", f"ctask/{name}", f"--for=jsonpath={{.status.observedGeneration}}={generation}")
    shared.kubectl("wait", f"ctask/{name}", "--for=condition=Succeeded", "--timeout=60s")
    assert shared.get("ctask", name)["status"]["phase"] == "Completed"


def test_a_deleted_task_that_somebody_keeps_is_stopped_all_the_same(shared: Place) -> None:
    name = shared.apply(STUBBORN)
    shared.until(name, "Running")
    shared.kubectl("patch", "ctask", name, "--type=merge", "-p", '{"metadata": {"finalizers": ["example.com/kept"]}}')
    shared.kubectl("delete", "ctask", name, "--wait=false")
    found = shared.until(name, "Cancelled")
    assert found["metadata"]["deletionTimestamp"]
    shared.until_gone(f"pod/{name}-1")
    shared.kubectl("patch", "ctask", name, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    shared.until_gone(f"ctask/{name}")


@pytest.mark.parametrize("label", ["cloudai.dev/task", "cloudai.dev/attempt"])
def test_labels_that_somebody_takes_from_a_pod_are_put_back(shared: Place, label: str) -> None:
    name = shared.apply(STUBBORN)
    shared.until(name, "Running")
    shared.kubectl("label", "pod", f"{name}-1", f"{label}-")
    there = "{.metadata.labels." + label.replace(".", r"\.") + "}"
    shared.kubectl("wait", f"pod/{name}-1", f"--for=jsonpath={there}", "--timeout=60s")
    shared.cancel(name)
    shared.until(name, "Cancelled")
    shared.until_gone(f"pod/{name}-1")


def test_another_task_of_the_same_name_has_nothing_of_the_one_before(shared: Place) -> None:
    name = shared.apply(STUBBORN)
    before = shared.until(name, "Running")["metadata"]["uid"]
    spec = {"image": SHELL, "userId": "ann", "resources": {"cpu": "100m", "memory": "32Mi"}, "script": "echo new"}
    shared.kubectl("replace", "--force", "-f", "-", given=task(name, spec))
    found = shared.until(name, "Completed")
    assert found["metadata"]["uid"] != before
    assert (found["status"]["attempt"], found["status"]["exitCode"]) == (1, 0)
    shared.until_kept(name)
    assert log(shared, name) == "new\n"


def test_pods_of_others_that_look_like_ours_are_left_alone_and_told_of(place: Place) -> None:
    sleeps = {"containers": [{"name": "main", "image": SHELL, "command": ["sleep", "1000"]}]}
    labels = {"cloudai.dev/task": "none", "cloudai.dev/attempt": "first"}
    for name, own in (("t1-1", {}), ("odd", labels), ("none-1", {"cloudai.dev/task": "none"})):
        meta = {"name": name, "labels": own}
        place.kubectl("create", "-f", "-", given={"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": sleeps})
    with place.operator():
        first, second = place.apply("true"), place.apply("true")
        assert first == "t1"
        place.until(second, "Completed")
        found = place.until_reason(first, "WaitingForAdmission")
        assert "Another Pod has the name of its Pod, t1-1" in found["status"]["message"]
        assert {"t1-1", "odd", "none-1"} <= {pod["metadata"]["name"] for pod in place.pods()}
        place.kubectl("delete", "pod", "t1-1", "--grace-period=0", "--force")
        place.until(first, "Completed")


def test_a_task_whose_next_attempt_is_refused_lets_the_last_one_go(place: Place) -> None:
    hard = {"spec": {"hard": {"count/pods": "1"}}}  # which a Pod uses up until it is gone
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}} | hard
    place.kubectl("create", "-f", "-", given=quota)
    place.kubectl("wait", "--for=jsonpath={.status.hard.count/pods}=1", "resourcequota/q", "--timeout=60s")
    with place.operator():
        name = place.apply("if [ $CLOUDAI_ATTEMPT = 1 ]; then sleep 1000; fi")
        place.until(name, "Running")
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": f"{name}-1"}}
        path = f"/api/v1/namespaces/{place.name}/pods/{name}-1/eviction"
        place.kubectl("create", "--raw", path, "-f", "-", given=eviction)
        assert place.until(name, "Completed")["status"]["attempt"] == 2


def test_quota_makes_tasks_wait_and_say_so(place: Place) -> None:
    hard = {"spec": {"hard": {"pods": "1"}}}
    place.kubectl(
        "create", "-f", "-", given={"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}} | hard
    )
    place.kubectl("wait", "--for=jsonpath={.status.hard.pods}=1", "resourcequota/q", "--timeout=60s")
    with place.operator():
        first = place.apply(STUBBORN)
        place.until(first, "Running")
        second = place.apply("true")
        found = place.until_reason(second, "QuotaExceeded")
        assert found["status"]["phase"] == "Queued"
        assert "exceeded quota" in found["status"]["message"]
        place.cancel(first)
        place.until(second, "Completed")


def test_a_pod_against_the_rules_of_its_namespace_fails_and_says_so(kube: Kube) -> None:
    with kube.namespace({"pod-security.kubernetes.io/enforce": "restricted"}) as place, place.operator():
        found = place.until(place.apply("true"), "Failed")
        assert found["status"]["reason"] == "PodRefused"
        assert "violates PodSecurity" in found["status"]["message"]
        user = {"runAsNonRoot": True, "runAsUser": 1000}
        place.until(place.apply("[ $(id -u) = 1000 ]", pod={"securityContext": user}), "Completed")


def test_a_pod_against_a_policy_of_the_cluster_fails_in_the_policys_words(place: Place) -> None:
    allowed = "!has(object.spec.activeDeadlineSeconds)"
    refused = {"containers": [{"name": "c", "image": SHELL}], "activeDeadlineSeconds": 1}
    with place.policy(allowed, "no deadlines here", refused), place.operator(task_retention_seconds="6"):
        name = place.apply("true", timeoutSeconds=60)
        found = place.until(name, "Failed")
        assert found["status"]["reason"] == "PodRefused"
        assert "no deadlines here" in found["status"]["message"]
        place.until(place.apply("true"), "Completed")
        place.until_gone(f"ctask/{name}")  # in its time, though no Pod of it was ever there


def test_tasks_run_as_the_user_that_the_operator_is_told(kube: Kube) -> None:
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    with kube.namespace(restricted) as place, place.operator(task_run_as_user="1234"):
        place.until(place.apply("[ $(id -u) = 1234 ]"), "Completed")


def test_what_happened_while_no_operator_ran_is_made_good(place: Place) -> None:
    with place.operator():
        ending, going = place.apply("until [ -e /tmp/x ]; do sleep 3; break; done"), place.apply(STUBBORN)
        removed = place.apply(STUBBORN)
        for name in (ending, going, removed):
            place.until(name, "Running")
    cancelled, late = place.apply("true"), place.apply("true")
    place.kubectl("delete", "ctask", removed, "--wait=false")
    place.cancel(cancelled)
    place.cancel(going)
    place.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{ending}-1", "--timeout=60s")
    with place.operator():
        place.until(ending, "Completed")
        place.until(going, "Cancelled")
        place.until(cancelled, "Cancelled")
        place.until(late, "Completed")
        place.until_gone(f"pod/{removed}-1")
    assert not [pod for pod in place.pods() if pod["metadata"]["name"] == f"{cancelled}-1"]


def test_it_reads_well_in_kubectl(shared: Place) -> None:
    name = shared.apply("exit 7")
    shared.until(name, "Failed")
    plain = shared.kubectl("get", "ctask", name).splitlines()
    assert plain[0].split() == ["NAME", "PHASE", "REASON", "EXIT", "NODE", "AGE"]
    assert plain[1].split()[:5] == [name, "Failed", "ExitCode", "7", "real-1"]
    wide = shared.kubectl("get", "ctask", name, "-o", "wide").splitlines()
    further = ["USER", "IMAGE", "CPU", "MEMORY", "GPU", "ATTEMPT", "MESSAGE"]
    assert wide[0].split() == [*plain[0].split(), *further]
    assert wide[1].split()[6:10] == ["ann", SHELL, "100m", "32Mi"]
    assert name in shared.kubectl("get", "cloudai")
    words = "The command ended with exit code 7"
    until_told(shared, name, words)
    _, _, events = shared.kubectl("describe", "ctask", name).partition("\nEvents:\n")
    (event,) = [line.split() for line in events.splitlines() if words in line]
    assert event[:2] == ["Warning", "ExitCode"]


def until_told(place: Place, name: str, words: str) -> None:
    """Return once an Event of the Task has those words: it comes after the status, and nobody knows its name before."""
    form = "-o=custom-columns=KIND:.regarding.kind,NAME:.regarding.name,NOTE:.note"
    command = [str(place.kube.programs["kubectl"]), f"--kubeconfig={place.kube.kubeconfig}", "-n", place.name]
    command += ["get", "events.events.k8s.io", "--watch", form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        for line in watch.stdout:
            if line.split()[:2] == ["Task", name] and words in line:
                break
        watch.terminate()
