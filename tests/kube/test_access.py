"""The chart's access rights, used for real: enough for everything that operator and API do, and not one too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloudai.settings import Settings
from cloudai.store.kube.api import connect
from cloudai.store.kube.store import KubernetesStore
from tests.api.conftest import client_of
from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube.access import account, review, rights, rules, until_allowed
from tests.kube.kube import PATIENCE, Json, Kube, Place

BODY = {"user_id": "ann", "docker_image": SHELL, "req_cpu": 0.1, "req_memory": 0.03125}
Grant = tuple[str, str, str]  # verb, API group, resource


# -- the operator


@pytest.fixture
def record(kube: Kube) -> Path:
    """Where the API server notes who asked it for what."""
    if kube.own is None:
        missing("The API server's audit log", "unset CLOUDAI_TEST_KUBECONFIG")
    return kube.own.audit


def operates(place: Place, kubeconfig: Path) -> None:
    """All that an operator does."""
    settings = {"kubeconfig": str(kubeconfig), "task_retention_seconds": "10"}
    operator = place.start_operator(**settings)
    try:
        failing = place.apply("echo words; exit 3")
        place.until(failing, "Failed")
        wait, kept = ("wait", f"--timeout={PATIENCE}s"), f"configmap/{place.log_of(failing)}"
        place.kubectl(*wait, "--for=create", kept)
        happened = place.get("events.events.k8s.io")["items"]
        assert failing in {one["regarding"]["name"] for one in happened if one["regarding"]["kind"] == "Task"}
        left = (f"ctask/{failing}", f"pod/{failing}-1", kept)
        place.kubectl(*wait, "--for=delete", *left)  # its time is over

        orphaned = place.apply("sleep 1000")
        place.until(orphaned, "Running")
        place.kubectl("delete", f"ctask/{orphaned}", "--cascade=orphan")
        place.until_gone(f"pod/{orphaned}-1")

        robbed = place.apply("sleep 1000", maxRetries=0)
        place.until(robbed, "Running")
        operator.stop()
        place.kubectl("patch", f"pod/{robbed}-1", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
        place.kubectl("delete", f"pod/{robbed}-1", "--grace-period=0", "--force")
        operator = place.start_operator(**settings)
        place.until(robbed, "Failed")
    finally:
        operator.stop()


@pytest.mark.timeout(300)
def test_the_operator_uses_all_the_rights_it_has(kube: Kube, record: Path, helm: Path, tmp_path: Path) -> None:
    with kube.namespace() as place, account(helm, place, "operator") as name:
        operates(place, place.kubeconfig_of(name, tmp_path))
        until_used(record, place, name, granted(rules(rights(helm, place, "operator", "r"))))


@pytest.mark.timeout(300)
def test_the_operator_has_no_right_twice(kube: Kube, record: Path, helm: Path, tmp_path: Path) -> None:
    def without(rule: int) -> None:
        """The operator asks for what was taken away, and is not let."""
        with kube.namespace() as place, account(helm, place, "operator", without=rule) as name:
            operator = place.start_operator(kubeconfig=str(place.kubeconfig_of(name, tmp_path)))
            try:
                place.apply("echo words; exit 3")
                until_forbidden(record, place, name, granted([known[rule]]))
            finally:
                operator.stop()

    with kube.namespace() as place:
        known = rules(rights(helm, place, "operator", "r"))
    with ThreadPoolExecutor(len(known)) as threads:
        list(threads.map(without, range(len(known))))


# -- the API


@pytest.fixture
def usage(kube: Kube) -> Iterator[None]:
    """Nodes have measurements: of a metrics server, or written down where there is none."""
    if kube.tried("get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes").returncode == 0:
        yield
        return
    kube.kubectl("create", "-f", "-", given=METRICS)
    kube.kubectl("wait", "--for=condition=Established", f"crd/{METRICS['metadata']['name']}", "--timeout=30s")
    node = kube.json("nodes")["items"][0]["metadata"]["name"]
    measured = {"apiVersion": "metrics.k8s.io/v1beta1", "kind": "NodeMetrics", "metadata": {"name": node}}
    kube.kubectl("create", "-f", "-", given=measured | {"usage": {"cpu": "100m", "memory": "100Mi"}})
    yield
    kube.kubectl("delete", "-f", "-", given=METRICS)


METRICS: Json = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "nodes.metrics.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, a test's stand-in for the aggregated API"},
    },
    "spec": {
        "group": "metrics.k8s.io",
        "scope": "Cluster",
        "names": {"plural": "nodes", "singular": "nodemetrics", "kind": "NodeMetrics"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


async def serves(store: KubernetesStore, settings: Settings, finished: str, running: str) -> None:
    """All that the API does."""
    await store.start()
    async with client_of(store, settings) as api:
        ready = await api.get("/readyz")
        assert ready.status_code == 200, ready.text
        submitted = await posted(api, {})
        assert (await api.post(f"/api/tasks/{submitted}/cancel")).status_code == 200
        key = {"Idempotency-Key": f"key-{submitted}"}
        assert await posted(api, key) == await posted(api, key)
        assert (await api.get(f"/api/tasks/{finished}/logs")).text == "done\n"
        assert (await api.get(f"/api/tasks/{running}/logs")).text == "ready\n"
        states = await store.list_workers()
        assert running in {run.task_id for one in states for run in await store.runs_of_worker(one.worker.worker_id)}
        assert any(one.worker.last_heartbeat != one.worker.registered_at for one in states)
        assert any(one.worker.cpu_usage is not None for one in states)


def serving(place: Place, kubeconfig: Path, directory: Path) -> Settings:
    return Settings(namespace=place.name, kubeconfig=kubeconfig, data_dir=directory, rate_limit_enabled=False)


async def posted(api: httpx.AsyncClient, headers: dict[str, str]) -> str:
    answer = await api.post("/api/tasks", json=BODY | {"command": "true"}, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


@pytest.fixture(scope="module")
def tasks(shared: Place) -> tuple[str, str]:
    """One that has finished, with its log kept, and one that runs."""
    finished = shared.apply("echo done")
    running = shared.apply("echo ready; sleep 1000")
    shared.until(finished, "Completed")
    shared.until_kept(finished)
    shared.kubectl("delete", "pod", f"{finished}-1")
    shared.until(running, "Running")
    return finished, running


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("usage")
async def test_the_api_uses_all_the_rights_it_has(
    record: Path, shared: Place, helm: Path, tmp_path: Path, tasks: tuple[str, str]
) -> None:
    with account(helm, shared, "api", f"{shared.name}-all") as name:
        settings = serving(shared, shared.kubeconfig_of(name, tmp_path), tmp_path)
        store = KubernetesStore(await connect(settings), settings)
        try:
            await serves(store, settings, *tasks)
        finally:
            await store.close()
        until_used(record, shared, name, granted(rules(rights(helm, shared, "api", "r"))))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("usage")
async def test_the_api_has_no_right_twice(
    record: Path, shared: Place, helm: Path, tmp_path: Path, tasks: tuple[str, str]
) -> None:
    async def without(rule: int) -> None:
        """The API asks for what was taken away, and is not let."""
        with contextlib.ExitStack() as ends:
            renting = account(helm, shared, "api", f"{shared.name}-{rule}", rule)
            name = await asyncio.to_thread(ends.enter_context, renting)
            kubeconfig = await asyncio.to_thread(shared.kubeconfig_of, name, tmp_path)
            settings = serving(shared, kubeconfig, tmp_path)
            store = KubernetesStore(await connect(settings), settings)
            trying = asyncio.ensure_future(serves(store, settings, *tasks))
            await asyncio.to_thread(until_forbidden, record, shared, name, granted([known[rule]]))
            await store.close()  # first: it cuts off what is under way
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)

    known = rules(rights(helm, shared, "api", "r"))
    await asyncio.gather(*map(without, range(len(known))))


# -- people


def test_who_may_view_or_edit_a_namespace_may_view_or_edit_its_tasks(place: Place, helm: Path) -> None:
    objects = {"apiVersion": "v1", "kind": "List", "items": rights(helm, place, "operator", f"{place.name}-people")}
    place.kube.kubectl("apply", "-f", "-", given=objects)
    try:
        for role in ("view", "edit"):
            place.kubectl("create", "rolebinding", f"of-{role}", f"--clusterrole={role}", f"--user={role}er")
        may = {
            "viewer": ("get", "list", "watch"),
            "editer": ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"),
        }
        last = [review(user, place.name, verbs[-1], "cloudai.dev", "tasks") for user, verbs in may.items()]
        until_allowed(place, last)
        for user, verbs in may.items():
            told = place.kubectl("auth", "can-i", "--list", f"--as={user}")
            found = [re.split(r"[\[\]]", line) for line in told.splitlines() if "cloudai.dev" in line]
            assert {resource.strip() for resource, *_ in found} == {"tasks.cloudai.dev"}  # the status is the operator's
            assert {verb for *_, allowed, _ in found for verb in allowed.split()} == set(verbs)
    finally:
        place.kube.kubectl("delete", "--ignore-not-found", "-f", "-", given=objects)


# -- what was granted, and what of it was used


def granted(known: list[tuple[Json, Json]]) -> set[Grant]:
    return {
        (verb, group, resource)
        for _, rule in known
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def until_used(record: Path, place: Place, name: str, grants: set[Grant]) -> None:
    """Return once the record says that the account was let do all of those; a watch is in it when it has ended."""
    asked: set[Grant] = set()
    with subprocess.Popen(["tail", "-n", "+1", "-F", record], stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        for grant, decision in asked_for(tail.stdout, place, name):
            assert decision == "allow", grant
            asked.add(grant)
            if asked >= grants:
                break
        tail.terminate()


def until_forbidden(record: Path, place: Place, name: str, grants: set[Grant]) -> None:
    """Return once the record says that the account asked for one of those, and was not let."""
    with subprocess.Popen(["tail", "-n", "+1", "-F", record], stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        next(
            grant for grant, decision in asked_for(tail.stdout, place, name) if decision == "forbid" and grant in grants
        )
        tail.terminate()


def asked_for(lines: Iterable[str], place: Place, name: str) -> Iterator[tuple[Grant, str]]:
    """What the account asked the API server for, and whether it was let."""
    user = f"system:serviceaccount:{place.name}:{name}"
    for line in lines:
        event: dict[str, Any] = json.loads(line) if user in line else {}
        if event.get("user", {}).get("username") != user or "objectRef" not in event:
            continue
        what = event["objectRef"]
        if what["resource"] != "selfsubjectaccessreviews":
            resource = f"{what['resource']}/{what['subresource']}" if "subresource" in what else what["resource"]
            grant = (event["verb"], what.get("apiGroup", ""), resource)
            yield grant, event["annotations"]["authorization.k8s.io/decision"]
