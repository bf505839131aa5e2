"""The project's own image on the real node: installed with Helm and without, used, upgraded under load, taken away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube import image
from tests.kube.kube import PATIENCE, ROOT, Kube, Place
from tests.kube.tilt import tiltfile

CHART = ROOT / "charts" / "cloudai"
RELEASE, NAMESPACE, TASKS = "cloudai", "cloudai-system", "cloudai-tasks"
BODY = {"user_id": "me", "docker_image": SHELL, "req_cpu": 0.1, "req_memory": 0.03125}
UNTIL_TOLD = "until [ -e /tmp/end ]; do sleep 0.2; done"
OBEDIENT = "trap 'exit 0' TERM; while true; do sleep 0.2; done"


@pytest.fixture(scope="module")
def loaded(kube: Kube, docker_host: str) -> Iterator[Kube]:
    """The cluster, with the image and, as a newcomer's, without the Task resource."""
    if kube.own is None or not kube.own.started:  # others' Tasks would go with the resource
        missing("A cluster of the tests' own", "make cluster-down, and unset CLOUDAI_TEST_KUBECONFIG")
    kube.load(image.build(docker_host))
    kube.kubectl("delete", "crd", "tasks.cloudai.dev")
    yield kube
    kube.prepare()


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
    }
    given = chosen | {name.replace("__", "."): value for name, value in more.items()}
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def released(loaded: Kube) -> Iterator[Kube]:
    """The namespace of the release enforces the strictest standard."""
    strict = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": NAMESPACE, "labels": strict}
    loaded.kubectl("create", "-f", "-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    yield loaded
    helm(loaded, "uninstall", RELEASE, "--ignore-not-found", "--wait")
    remove_everything(loaded)
    loaded.kubectl("delete", "namespace", NAMESPACE)


@pytest.mark.timeout(600)
def test_a_release_from_install_to_uninstall(released: Kube, tmp_path: Path) -> None:
    wait = ("--wait", "--timeout=240s")
    notes = helm(released, "install", RELEASE, str(older_chart(tmp_path)), "--create-namespace", *wait, *values())
    follow(released, notes)
    assert "PHASE" not in released.kubectl("-n", TASKS, "get", "ctask")
    place = Place(released, TASKS)
    with through_the_service(released) as api:
        done = submit(api, "echo through the service")
        assert until(api, done, "completed")["exit_code"] == 0
        assert api.get(f"/api/tasks/{done}/logs").text == "through the service\n"
        helm(released, "test", RELEASE, "--timeout=120s")

        running = [submit(api, f"echo start {number}; {UNTIL_TOLD}; echo end {number}") for number in range(3)]
        for task_id in running:
            until(api, task_id, "running")
        tasks, parts = uids(released, TASKS), uids(released, NAMESPACE)
        louder = values(operator__logLevel="debug", api__logLevel="debug")
        with answered_throughout(str(api.base_url.join(f"/api/tasks/{done}"))):
            helm(released, "upgrade", RELEASE, str(CHART), *wait, *louder)
            for name in (name for name in parts if "-api-" in name):
                Place(released, NAMESPACE).until_gone(f"pod/{name}")
    assert "PHASE" in released.kubectl("-n", TASKS, "get", "ctask")  # the Task resource is the new chart's
    assert not {uid for name, uid in parts.items() if "-test" not in name} & set(uids(released, NAMESPACE).values())
    with through_the_service(released) as api:
        for task_id in running:
            assert until(api, task_id, "running")["attempt"] == 1
            # What the exec says is of no matter: it may be ended with the container.
            place.kubectl("exec", f"{task_id}-1", "--", "touch", "/tmp/end", check=False)
        for number, task_id in enumerate(running):
            assert until(api, task_id, "completed")["attempt"] == 1
            assert api.get(f"/api/tasks/{task_id}/logs").text == f"start {number}\nend {number}\n"
        after = uids(released, TASKS)
        assert {name: after.get(name) for name in tasks} == tasks
        left = submit(api, f"{UNTIL_TOLD}; exit 9")
        until(api, left, "running")
    helm(released, "uninstall", RELEASE, "--wait")
    another = ("install", "another", str(CHART), "--dry-run=server", *values())
    with pytest.raises(AssertionError, match="invalid ownership metadata"):
        helm(released, *another)
    helm(released, *another, "--take-ownership")
    place.kubectl("exec", f"{left}-1", "--", "touch", "/tmp/end", check=False)
    finished = "--for=jsonpath={.status.phase}=Failed"
    place.kubectl("wait", f"pod/{left}-1", finished, "--timeout=60s")
    assert place.get("ctask", left)["status"]["phase"] == "Running"  # as it was told of last; nobody writes it now
    place.kubectl("delete", "lease/cloudai-controller")  # whose holder may not even release it any more
    with place.operator():  # whoever comes next makes it good
        assert place.until(left, "Failed")["status"]["exitCode"] == 9


def older_chart(directory: Path) -> Path:
    """One whose Tasks tell less."""
    shutil.copytree(CHART, directory / "chart")
    file = directory / "chart" / "files" / "tasks.yaml"
    crd = yaml.safe_load(file.read_text())
    columns = crd["spec"]["versions"][0]["additionalPrinterColumns"]
    crd["spec"]["versions"][0]["additionalPrinterColumns"] = [one for one in columns if one["name"] != "Phase"]
    file.write_text(yaml.safe_dump(crd))
    return directory / "chart"


def uids(kube: Kube, namespace: str) -> dict[str, str]:
    """Of the Pods there that are not on their way out, by name."""
    pods = [pod["metadata"] for pod in kube.json("-n", namespace, "pods")["items"]]
    return {meta["name"]: meta["uid"] for meta in pods if "deletionTimestamp" not in meta}


def follow(kube: Kube, notes: str) -> None:
    """Do what Helm's notes say; the port of this machine is a free one."""
    rollout, forward, curl = re.findall(r"^  ((?:kubectl|curl) .+)$", notes, re.MULTILINE)
    shell(kube, rollout)
    forward = forward.replace(" 8080:", " :")
    with subprocess.Popen(["sh", "-c", f"exec {forward}"], env=environment(kube), stdout=subprocess.PIPE) as forwarding:
        assert forwarding.stdout is not None
        (port,) = re.findall(rb"127.0.0.1:([0-9]+) -> ", forwarding.stdout.readline())
        answer = json.loads(shell(kube, curl.replace("127.0.0.1:8080", f"127.0.0.1:{int(port)}")))
        forwarding.terminate()
    Place(kube, TASKS).until(answer["task_id"], "Completed")


def shell(kube: Kube, line: str) -> str:
    """A line of the documents, as people type it."""
    done = subprocess.run(["sh", "-ec", line], env=environment(kube), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def environment(kube: Kube) -> Mapping[str, str]:
    path = f"{kube.programs['kubectl'].parent}:{os.environ['PATH']}"
    return {**os.environ, "KUBECONFIG": str(kube.kubeconfig), "PATH": path}


def of_the_docs(heading: str, first: str) -> str:
    """The block of commands under that heading that begins with `first`."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (chapter,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in re.findall(r"(?:^    .+\n)+", chapter, re.MULTILINE) if block[4:].startswith(first)]
    return str(block)


def remove_everything(kube: Kube) -> None:
    """As the documents say for when no operator runs any more."""
    shell(kube, of_the_docs("Uninstall", "kubectl -n cloudai-tasks delete ctask --all"))


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """A directory with those of the project, and the tests' image in them."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    return tmp_path


@pytest.mark.timeout(300)
def test_without_helm_it_runs_too_and_nothing_is_left_of_it(loaded: Kube, manifests: Path) -> None:
    before = cluster_wide(loaded)
    install = of_the_docs("Install", "sed").replace("registry.example/cloudai:0.1.0", f"{image.NAME}:{image.TAG}")
    place = Place(loaded, TASKS)
    try:
        shell(loaded, f"cd {shlex.quote(str(manifests))}\n{install}")
        assert cluster_wide(loaded) > before
        for part in ("operator", "api"):
            shell(loaded, f"kubectl -n {NAMESPACE} rollout status deployment/cloudai-{part} --timeout={PATIENCE}s")
        place.until(place.apply("true"), "Completed")
        place.until(place.apply(OBEDIENT), "Running")
    finally:
        shell(loaded, f"cd {shlex.quote(str(manifests))}\n{of_the_docs('Uninstall', 'kubectl delete namespace')}")
        remove_everything(loaded)
    assert cluster_wide(loaded) == before


def cluster_wide(kube: Kube) -> set[str]:
    """The names of all things of ours that lie in no namespace, and of the namespaces."""
    kinds = "namespaces,crds,clusterroles,clusterrolebindings"
    found = kube.kubectl("get", kinds, "-o", "name").split()
    rights = kube.kubectl("-n", "kube-node-lease", "get", "roles,rolebindings", "-o", "name").split()
    return {name for name in [*found, *rights] if "cloudai" in name}


@pytest.mark.timeout(300)
def test_the_image_of_the_tiltfile_runs_the_code_that_was_copied_into_it(
    loaded: Kube, docker_host: str, helm: Path
) -> None:
    asked = tiltfile(helm)
    name = f"{image.NAME}:live"
    image.build_as(docker_host, name, asked.build["dockerfile_contents"])
    (live,) = {str(Path(target).parent) for _, target in asked.copies}
    change = f"echo 'print(__file__)' >> {live}/cloudai/__init__.py; date > {asked.build['restart_file']}"
    command = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        "-e",
        f"PYTHONPATH={live}",
        "--entrypoint",
        "sh",
        name,
        "-c",
        f"{change}; cloudai --help",
    ]
    done = subprocess.run(command, env={**os.environ, "DOCKER_HOST": docker_host}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{live}/cloudai/__init__.py"


def through_the_service(kube: Kube) -> httpx.Client:
    """A client of the Service as it is reached from outside: a port of the node, passed on by kube-proxy.

    kube-proxy takes its time to hear which Pods are ready; until then the port refuses connections.
    """
    found = kube.json("-n", NAMESPACE, "service", f"{RELEASE}-api")
    assert kube.own is not None
    port = found["spec"]["ports"][0]["nodePort"]
    transport = httpx.HTTPTransport(retries=8)
    return httpx.Client(base_url=f"http://{kube.own.address}:{port}", timeout=60, transport=transport)


@contextlib.contextmanager
def answered_throughout(url: str) -> Iterator[None]:
    """Requests one after the other, each over a connection of its own, none of them tried again."""
    over = threading.Event()

    def ask() -> int:
        count = 0
        with httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not over.wait(0.01):
                client.get(url).raise_for_status()
                count += 1
        return count

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            yield
        finally:
            over.set()
        assert asking.result()


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
