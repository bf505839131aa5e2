"""The Task resource as the API server has it: what it takes, what it refuses, how it reads. No operator runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloudai.resources import ENDED_WELL
from cloudai.settings import Settings
from cloudai.store.kube.store import open_kubernetes
from cloudai.store.kube.task_resource import LONGEST_MESSAGE, status_of, task_of
from tests.api.conftest import client_of
from tests.cluster.images import SHELL
from tests.kube.access import TRIES
from tests.kube.kube import ROOT, Json, Kube, Place, task

CRD = yaml.safe_load((ROOT / "manifests" / "crds" / "tasks.yaml").read_text())
VERSION = CRD["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
AMOUNTS = {"cpu": "20m", "memory": "32Mi"}
PLAIN = {"image": SHELL, "resources": AMOUNTS}


@pytest.fixture(scope="module")
def bare(kube: Kube) -> Iterator[Place]:
    with kube.namespace() as place:
        yield place


def make(place: Place, name: str, **spec: Any) -> None:
    place.kubectl("create", "-f", "-", given=task(name, PLAIN | spec))


def refusal(place: Place, given: Json) -> str:
    """What the API server complains of."""
    done = place.kube.tried("-n", place.name, "create", "--dry-run=server", "-f", "-", given=given)
    assert done.returncode != 0, given
    return done.stderr


# -- how it reads


def fields(schema: Json, path: str) -> Iterator[tuple[str, Json]]:
    """Every field below `path` with its schema."""
    for name, inner in (schema.get("properties") or {}).items():
        yield f"{path}.{name}", inner
        yield from fields(inner.get("items") or inner, f"{path}.{name}")


def test_every_field_has_a_sentence_of_its_own() -> None:
    described = dict(fields(SCHEMA, "ctask")) | {"ctask": SCHEMA}
    del described["ctask.metadata"]  # which Kubernetes itself describes, and lets nobody else
    bare = [path for path, schema in described.items() if not schema.get("description", "").endswith(".")]
    assert bare == []


def test_kubectl_explains_every_level(kube: Kube) -> None:
    levels = [
        "ctask",
        *(path for path, inner in fields(SCHEMA, "ctask") if "properties" in (inner.get("items") or inner)),
    ]
    assert "ctask.spec.pod.tolerations" in levels
    # The API server takes in what it can explain a little later than the resource, and tells nobody when.
    assert any(kube.tried("explain", "ctask").returncode == 0 for _ in range(TRIES))
    for level in levels:
        told = kube.kubectl("explain", level)
        assert "<empty>" not in told
        words = " ".join(told.split())
        for path, inner in fields(SCHEMA, "ctask"):
            if path.rpartition(".")[0] == level and level != "ctask":
                assert inner["description"] in words, path
    tree = {line.split()[0] for line in kube.kubectl("explain", "ctask", "--recursive").splitlines() if line.strip()}
    assert {path.rpartition(".")[2] for path, _ in fields(SCHEMA, "ctask")} <= tree


async def test_whose_a_task_is_says_its_spec_else_its_label_else_the_namespace(bare: Place, tmp_path: Path) -> None:
    label = {"cloudai.dev/user": "lea"}
    for name, labels, spec in (("own", label, {"userId": "olga"}), ("labelled", label, {}), ("nobodys", {}, {})):
        given = task(name, PLAIN | spec)
        given["metadata"]["labels"] = labels
        bare.kubectl("create", "-f", "-", given=given)
    settings = Settings(namespace=bare.name, kubeconfig=bare.kube.kubeconfig, data_dir=tmp_path)
    store = await open_kubernetes(settings)
    try:
        async with client_of(store, settings) as api:
            users = {"own": "olga", "labelled": "lea", "nobodys": bare.name}
            for name, user in users.items():
                assert (await api.get(f"/api/tasks/{name}")).json()["user_id"] == user
                listed = (await api.get("/api/tasks", params={"user_id": user})).json()["tasks"]
                assert [one["task_id"] for one in listed] == [name]
    finally:
        await store.close()


def test_tasks_are_selected_by_user_phase_and_node(bare: Place) -> None:
    for name, user, phase, node in (
        ("s1", "una", "Running", "n1"),
        ("s2", "una", "Failed", "n2"),
        ("s3", "udo", "Failed", "n1"),
    ):
        make(bare, name, userId=user)
        status = json.dumps({"status": {"phase": phase, "node": node}})
        bare.kubectl("patch", "ctask", name, "--subresource=status", "--type=merge", "-p", status)

    def selected(selector: str) -> list[str]:
        found = bare.kubectl("get", "ctask", f"--field-selector={selector}", "-o", "name")
        return sorted(line.rpartition("/")[2] for line in found.split())

    assert selected("spec.userId=una") == ["s1", "s2"]
    assert selected("status.node=n1") == ["s1", "s3"]
    assert selected("status.phase=Failed") == ["s2", "s3"]
    assert selected("status.phase=Failed,spec.userId=una") == ["s2"]
    assert len(VERSION["selectableFields"]) == 3


# -- what is taken and what is refused

LARGEST: Json = {
    "image": "i" * 512,
    "command": ["c" * 800] * 1000,
    "userId": "u" * 256,
    "resources": {"cpu": "999999", "memory": "999P", "storage": "999P", "gpu": 1024},
    "timeoutSeconds": 315360000,
    "maxRetries": 100,
    "cancelRequested": False,
    "pod": {
        "labels": {f"l{number}": "v" * 63 for number in range(50)},
        "annotations": {f"a{number}": "v" * 1000 for number in range(50)},
        "nodeSelector": {f"n{number}": "v" * 63 for number in range(50)},
        "tolerations": [{"key": "k" * 317, "operator": "Equal", "value": "v" * 63, "effect": "NoExecute"}] * 50,
        "imagePullSecrets": [{"name": "s" * 253}] * 20,
        "priorityClassName": "p" * 253,
        "runtimeClassName": "r" * 253,
        "serviceAccountName": "a" * 253,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 0, "runAsGroup": 0, "fsGroup": 0},
    },
}


def test_the_largest_wish_is_taken(bare: Place) -> None:
    bare.kubectl("create", "--dry-run=server", "-f", "-", given=task("n" * 52, LARGEST))
    bare.kubectl("create", "--dry-run=server", "-f", "-", given=task("n", PLAIN | {"script": "s" * 32000}))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"command": ["a"], "script": "a"}, "give command or script, not both"),
        ({"image": ""}, "spec.image"),
        ({"image": "a b"}, "spec.image"),
        ({"image": "i" * 513}, "spec.image: Too long"),
        ({"command": []}, "spec.command"),
        ({"command": ["a"] * 1001}, "spec.command: Too many"),
        ({"command": ["a" * 32001]}, "spec.command[0]: Too long"),
        ({"script": ""}, "spec.script"),
        ({"script": "s" * 32001}, "spec.script: Too long"),
        ({"userId": ""}, "spec.userId"),
        ({"userId": "u" * 257}, "spec.userId: Too long"),
        ({"timeoutSeconds": 0}, "spec.timeoutSeconds"),
        ({"timeoutSeconds": 315360001}, "spec.timeoutSeconds"),
        ({"maxRetries": -1}, "spec.maxRetries"),
        ({"maxRetries": 101}, "spec.maxRetries"),
        ({"resources": {"cpu": "1"}}, "spec.resources.memory: Required value"),
        ({"resources": AMOUNTS | {"gpu": 1025}}, "spec.resources.gpu"),
        ({"resources": AMOUNTS | {"gpu": 0.5}}, "spec.resources.gpu"),
        ({"resources": AMOUNTS | {"cpu": "0"}}, "spec.resources.cpu"),
        ({"resources": AMOUNTS | {"cpu": "1e1000"}}, "spec.resources.cpu"),
        ({"resources": AMOUNTS | {"memory": "1E"}}, "spec.resources.memory"),
        ({"resources": AMOUNTS | {"memory": "-1"}}, "spec.resources.memory"),
        ({"resources": AMOUNTS | {"memory": "512m"}}, "must be a quantity of at least 6Mi and below 1E"),
        ({"resources": AMOUNTS | {"storage": "x"}}, "spec.resources.storage"),
        ({"pod": {"labels": {f"l{number}": "" for number in range(51)}}}, "spec.pod.labels: Too many"),
        ({"pod": {"labels": {"l": "v" * 64}}}, "spec.pod.labels.l: Too long"),
        ({"pod": {"annotations": {"a": "v" * 4097}}}, "spec.pod.annotations.a: Too long"),
        ({"pod": {"tolerations": [{}] * 51}}, "spec.pod.tolerations: Too many"),
        ({"pod": {"tolerations": [{"operator": "Maybe"}]}}, "spec.pod.tolerations[0].operator: Unsupported value"),
        ({"pod": {"imagePullSecrets": [{"name": "s"}] * 21}}, "spec.pod.imagePullSecrets: Too many"),
        ({"pod": {"priorityClassName": "p" * 254}}, "spec.pod.priorityClassName: Too long"),
        ({"pod": {"securityContext": {"runAsUser": -1}}}, "spec.pod.securityContext.runAsUser"),
        ({"pod": {"hostNetwork": True}}, 'unknown field "spec.pod.hostNetwork"'),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_a_wish_beyond_its_limits_is_refused_by_name(bare: Place, spec: Json, words: str) -> None:
    assert words in refusal(bare, task("odd", PLAIN | spec))


@pytest.mark.parametrize("name", ["n" * 53, "a.b"])
def test_a_name_that_no_pod_could_be_named_after_is_refused(bare: Place, name: str) -> None:
    assert "a Task's name has at most 52 characters" in refusal(bare, task(name, PLAIN))


def test_a_wish_stays_as_it_was_made(bare: Place) -> None:
    made = {"script": "true", "userId": "ann", "timeoutSeconds": 60, "maxRetries": 1, "pod": {"labels": {"a": "b"}}}
    make(bare, "kept", **made)
    other: Json = {"image": "other", "script": "false", "userId": "ben", "timeoutSeconds": 61, "maxRetries": 2}
    other |= {"resources": {"cpu": "21m"}, "pod": {"labels": {"a": "c"}}}
    assert other.keys() == bare.get("ctask", "kept")["spec"].keys()
    changes = list(other.items()) + [(field, None) for field in made] + [("command", ["new"])]
    for field, value in changes:
        assert f"{field} cannot change; make another Task" in patched(bare, "kept", {field: value})


def test_a_cancellation_is_wished_once_and_for_all(bare: Place) -> None:
    make(bare, "going", cancelRequested=False)
    for first in (None, True):
        assert patched(bare, "going", {"cancelRequested": first}) == ""
    make(bare, "wanted")
    assert patched(bare, "wanted", {"cancelRequested": True}) == ""
    make(bare, "cancelled", cancelRequested=True)
    for later in (None, False):
        assert "a cancellation cannot be taken back" in patched(bare, "cancelled", {"cancelRequested": later})


def patched(place: Place, name: str, spec: Json) -> str:
    """What the API server complains of; nothing is changed."""
    patch = json.dumps({"spec": spec})
    command = ("-n", place.name, "patch", "ctask", name, "--dry-run=server", "--type=merge", "-p", patch)
    return place.kube.tried(*command).stderr


def test_a_good_end_says_so_though_its_status_does_not_repeat_it() -> None:
    meta = {"name": "t", "namespace": "here", "resourceVersion": "5", "creationTimestamp": "2025-11-16T10:30:00Z"}
    for phase, words in (("Completed", ENDED_WELL), ("Failed", None), ("Running", None)):
        assert task_of({"metadata": meta, "spec": PLAIN, "status": {"phase": phase}}).message == words


@pytest.mark.parametrize("end", ["Completed", "Failed", "Cancelled"])
def test_an_end_never_changes(bare: Place, end: str) -> None:
    def told(status: Json | None) -> str:
        patch = json.dumps({"status": status})
        command = ("patch", "ctask", name, "--subresource=status", "--type=merge", "-p", patch)
        return bare.kube.tried("-n", bare.name, *command).stderr

    name = f"ended-{end.lower()}"
    make(bare, name)
    for phase in ("Running", end):
        assert told({"phase": phase}) == ""
    for later in ({"phase": "Running"}, {"phase": None}, None):
        assert "the phase of a Task that has ended cannot change" in told(later)
    assert told({"phase": end, "message": "other words"}) == ""


def test_a_status_is_no_longer_than_the_operator_writes_it(bare: Place) -> None:
    make(bare, "told")
    found = bare.get("ctask", "told")
    task_told = task_of(found | {"status": {"phase": "Failed", "reason": "ExitCode", "message": "ß" * 5000}})
    for extra, taken in (("", True), ("x", False)):
        status = status_of(task_told, [], {}, 1, 0)
        assert len(status["message"]) == LONGEST_MESSAGE
        status["message"] += extra
        patch = json.dumps({"status": status})
        command = ("patch", "ctask", "told", "--subresource=status", "--dry-run=server", "--type=merge", "-p", patch)
        done = bare.kube.tried("-n", bare.name, *command)
        assert (done.returncode == 0) is taken, done.stderr
