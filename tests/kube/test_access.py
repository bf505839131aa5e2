"""The chart's access rights, used for real: enough for everything that operator and API do, and not one too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloudai.errors import CloudAIError
from cloudai.settings import Settings
from cloudai.store.kube.store import KubernetesStore, open_kubernetes
from tests.api.conftest import client_of
from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube.access import account, rights, rules
from tests.kube.kube import Json, Kube, Place

BODY = {"user_id": "ann", "docker_image": SHELL, "req_cpu": 0.02, "req_memory": 0.03125}
PATIENCE, IMPATIENCE = 90, 12  # seconds: where all must work, and where something must not
Grant = tuple[str, str, str]  # verb, API group, resource


# -- the operator


def operates(place: Place, kubeconfig: Path, patience: int) -> None:
    """All that an operator does; raises AssertionError at the first thing that does not come about."""
    settings = {"kubeconfig": str(kubeconfig), "task_retention_seconds": "6"}
    operator = place.start_operator(**settings)
    try:
        failing = place.apply("echo words; exit 3")
        place.until(failing, "Failed", patience)
        wait = ("wait", "--for=create", f"--timeout={patience}s")
        place.kubectl(*wait, f"configmap/{failing}-1-log")
        happened = place.get("events.events.k8s.io")["items"]
        assert failing in {one["regarding"]["name"] for one in happened if one["regarding"]["kind"] == "Task"}
        left = (f"ctask/{failing}", f"pod/{failing}-1", f"configmap/{failing}-1-log")
        place.kubectl("wait", "--for=delete", *left, f"--timeout={patience}s")  # its time is over

        orphaned = place.apply("sleep 1000")
        place.until(orphaned, "Running", patience)
        place.kubectl("delete", f"ctask/{orphaned}", "--cascade=orphan")
        place.kubectl("wait", "--for=delete", f"pod/{orphaned}-1", f"--timeout={patience}s")

        robbed = place.apply("sleep 1000", maxRetries=0)
        place.until(robbed, "Running", patience)
        operator.stop()
        place.kubectl("patch", f"pod/{robbed}-1", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
        place.kubectl("delete", f"pod/{robbed}-1", "--grace-period=0", "--force")
        operator = place.start_operator(**settings)
        place.until(robbed, "Failed", patience)
    finally:
        operator.stop()


@pytest.mark.timeout(300)
def test_the_operator_has_the_rights_it_needs_and_no_others(kube: Kube, helm: Path, tmp_path: Path) -> None:
    def without(rule: int | None) -> set[Grant]:
        """What was used; nothing where a rule was taken away, since then something did not work."""
        with kube.namespace() as place, account(helm, place, "operator", without=rule) as name:
            kubeconfig = place.kubeconfig_of(name, tmp_path)
            if rule is None:
                operates(place, kubeconfig, PATIENCE)
                return used(kube, place, name)
            with pytest.raises(AssertionError):
                operates(place, kubeconfig, IMPATIENCE)
            return set()

    with kube.namespace() as place:
        known = rules(rights(helm, place, "operator", "r"))
    assert without(None) == granted(known)
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


async def serves(place: Place, kubeconfig: Path, tmp_path: Path, finished: str, running: str) -> None:
    """All that the API does; raises AssertionError or CloudAIError at the first thing that fails."""
    settings = Settings(namespace=place.name, kubeconfig=kubeconfig, data_dir=tmp_path, rate_limit_enabled=False)
    store = await open_kubernetes(settings)
    async with opened(store), client_of(store, settings) as api:
        ready = await api.get("/readyz")
        assert ready.status_code == 200, ready.text
        submitted = await posted(api, {})
        assert (await api.post(f"/api/tasks/{submitted}/cancel")).status_code == 200
        key = {"Idempotency-Key": f"key-{kubeconfig.name}"}
        assert await posted(api, key) == await posted(api, key)
        assert (await api.get(f"/api/tasks/{finished}/logs")).text == "done\n"
        assert (await api.get(f"/api/tasks/{running}/logs")).text == "ready\n"
        states = await store.list_workers()
        assert running in {run.task_id for one in states for run in await store.runs_of_worker(one.worker.worker_id)}
        assert any(one.worker.last_heartbeat != one.worker.registered_at for one in states)
        assert any(one.worker.cpu_usage is not None for one in states)


@contextlib.asynccontextmanager
async def opened(store: KubernetesStore) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await store.close()


async def posted(api: httpx.AsyncClient, headers: dict[str, str]) -> str:
    answer = await api.post("/api/tasks", json=BODY | {"command": "true"}, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("usage")
async def test_the_api_has_the_rights_it_needs_and_no_others(
    kube: Kube, shared: Place, helm: Path, tmp_path: Path
) -> None:
    finished = shared.apply("echo done")
    running = shared.apply("echo ready; sleep 1000")
    shared.until(finished, "Completed")
    shared.kube.until_there(shared.name, "configmap", f"{finished}-1-log")
    shared.kubectl("delete", "pod", f"{finished}-1")
    shared.until(running, "Running")

    async def without(rule: int | None) -> set[Grant]:
        release = f"{shared.name}-{'all' if rule is None else rule}"
        with contextlib.ExitStack() as ends:
            renting = account(helm, shared, "api", release, rule)
            name = await asyncio.to_thread(ends.enter_context, renting)
            kubeconfig = await asyncio.to_thread(shared.kubeconfig_of, name, tmp_path)
            if rule is None:
                await serves(shared, kubeconfig, tmp_path, finished, running)
                return await asyncio.to_thread(used, kube, shared, name)
            with pytest.raises((AssertionError, CloudAIError)):
                await serves(shared, kubeconfig, tmp_path, finished, running)
            return set()

    known = rules(rights(helm, shared, "api", "r"))
    assert await without(None) == granted(known)
    await asyncio.gather(*map(without, range(len(known))))


# -- what was granted, and what of it was used


def granted(known: list[tuple[Json, Json]]) -> set[Grant]:
    return {
        (verb, group, resource)
        for _, rule in known
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(kube: Kube, place: Place, name: str) -> set[Grant]:
    """What the account asked for and was let do, by the API server's own record."""
    if kube.own is None:
        missing("The API server's audit log", "unset CLOUDAI_TEST_KUBECONFIG")
    user = f"system:serviceaccount:{place.name}:{name}"
    asked: set[Grant] = set()
    with kube.own.audit.open() as log:
        for line in log:
            event: dict[str, Any] = json.loads(line) if user in line else {}
            if event.get("user", {}).get("username") != user or "objectRef" not in event:
                continue
            what = event["objectRef"]
            resource = f"{what['resource']}/{what['subresource']}" if "subresource" in what else what["resource"]
            grant = (event["verb"], what.get("apiGroup", ""), resource)
            if what["resource"] == "selfsubjectaccessreviews":
                continue
            assert event["annotations"]["authorization.k8s.io/decision"] == "allow", grant
            asked.add(grant)
    return asked
