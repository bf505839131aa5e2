"""Helm, the project's own image and the real node: install, use, upgrade under load, uninstall."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube import image
from tests.kube.kube import ROOT, Kube, Place

RELEASE, NAMESPACE, TASKS = "cloudai", "cloudai-system", "cloudai-tasks"
BODY = {"user_id": "me", "docker_image": SHELL, "req_cpu": 0.02, "req_memory": 0.03125}


@pytest.fixture(scope="module")
def loaded(kube: Kube, docker_host: str) -> Kube:
    """The cluster, with the image."""
    if kube.own is None:
        missing("The real node of the tests' own cluster", "unset CLOUDAI_TEST_KUBECONFIG")
    kube.load(image.build(docker_host))
    return kube


def helm(kube: Kube, *arguments: str) -> str:
    command = [str(kube.programs["helm"]), f"--kubeconfig={kube.kubeconfig}", "-n", NAMESPACE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        seen = kube.kubectl("get", "pods,events", "-A") + kube.kubectl("-n", NAMESPACE, "describe", "pods", check=False)
        raise AssertionError(f"helm {' '.join(arguments)}: {done.stdout}{done.stderr}\n{seen[-6000:]}")
    return done.stdout


def values(**more: str) -> list[str]:
    chosen = {
        "image.repository": image.NAME,
        "image.tag": image.TAG,
        "tasks.namespace": TASKS,
        "api.service.type": "NodePort",
        "api.rateLimit.enabled": "false",
        "test.image": SHELL,
    }
    given = chosen | {name.replace("__", "."): value for name, value in more.items()}
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def released(loaded: Kube) -> Iterator[Kube]:
    yield loaded
    helm(loaded, "uninstall", RELEASE, "--ignore-not-found", "--wait")
    loaded.kubectl("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


@pytest.mark.timeout(600)
def test_a_release_from_install_to_uninstall(released: Kube) -> None:
    chart = str(ROOT / "charts" / "cloudai")
    # The tests have applied the CRD already; a newcomer's cluster has none to take over.
    notes = helm(
        released,
        "install",
        RELEASE,
        chart,
        "--create-namespace",
        "--take-ownership",
        "--wait",
        "--timeout=240s",
        *values(),
    )
    assert "kubectl -n cloudai-system port-forward" in notes
    place = Place(released, TASKS)
    with through_the_service(released) as api:
        done = submit(api, "echo through the service")
        assert until(api, done, "completed")["exit_code"] == 0
        assert api.get(f"/api/tasks/{done}/logs").text == "through the service\n"
        helm(released, "test", RELEASE, "--timeout=120s")

        running = [submit(api, f"echo start {number}; sleep 25; echo end {number}") for number in range(3)]
        for task_id in running:
            until(api, task_id, "running")
        before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in place.pods()}
        helm(released, "upgrade", RELEASE, chart, "--wait", "--timeout=240s", *values(tasks__imageGraceSeconds="61"))
    with through_the_service(released) as api:
        for number, task_id in enumerate(running):
            task = until(api, task_id, "completed")
            assert task["attempt"] == 1
            assert api.get(f"/api/tasks/{task_id}/logs").text == f"start {number}\nend {number}\n"
        after = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in place.pods()}
        assert {name: after.get(name) for name in before} == before
        left = submit(api, "sleep 5; exit 9")
        until(api, left, "running")
    helm(released, "uninstall", RELEASE, "--wait")
    finished = "--for=jsonpath={.status.phase}=Failed"
    place.kubectl("wait", f"pod/{left}-1", finished, "--timeout=60s")
    assert place.get("ctask", left)["status"]["phase"] == "Running"  # as it was told of last; nobody writes it now
    with place.operator():  # whoever comes next makes it good
        assert place.until(left, "Failed")["status"]["exitCode"] == 9


def through_the_service(kube: Kube) -> httpx.Client:
    """A client of the Service as it is reached from outside: a port of the node, passed on by kube-proxy.

    kube-proxy takes its time to hear which Pods are ready; until then the port refuses connections.
    """
    found = kube.json("-n", NAMESPACE, "service", f"{RELEASE}-api")
    assert kube.own is not None
    port = found["spec"]["ports"][0]["nodePort"]
    transport = httpx.HTTPTransport(retries=8)
    return httpx.Client(base_url=f"http://{kube.own.address}:{port}", timeout=60, transport=transport)


def submit(api: httpx.Client, command: str) -> str:
    answer = api.post("/api/tasks", json=BODY | {"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


def until(api: httpx.Client, task_id: str, status: str) -> dict[str, Any]:
    task: dict[str, Any] = {"version": 0}
    for _ in range(20):
        task = api.get(f"/api/tasks/{task_id}", params={"wait_seconds": 20, "version": task["version"]}).json()
        if task["status"] == status:
            return task
    raise AssertionError(task)
