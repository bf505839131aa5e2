"""A namespace of a real cluster with an operator of its own, used the way people do: with kubectl."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudai.store.kube.logs import Log
from tests.cluster.cluster import NODE, Cluster
from tests.cluster.images import SHELL, load
from tests.engines import missing

ROOT = Path(__file__).parents[2]
PATIENCE = 90  # seconds; whatever takes longer counts as never
TRIES = 500  # of a question that costs a run of kubectl
Json = dict[str, Any]
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Kube:
    """A cluster: its kubeconfig, and the programs that speak to it."""

    kubeconfig: Path
    programs: Mapping[str, Path]
    own: Cluster | None = None  # where the tests have made it themselves

    @functools.cached_property
    def node(self) -> str:
        """The node that takes pods which tolerate nothing."""
        if self.own is not None:
            return NODE
        nodes = self.json("nodes")["items"]
        free = [one["metadata"]["name"] for one in nodes if not one["spec"].get("taints")]
        if len(free) != 1:
            missing("A cluster with one node that takes pods", f"taint the others; this one has {free}")
        return str(free[0])

    def load(self, archive: bytes) -> None:
        """Give the real node an image, as `docker save` writes it."""
        assert self.own is not None
        load(self.own, archive)

    def kubectl(self, *arguments: str, given: object = None, check: bool = True) -> str:
        """What it printed; raises with what it complained of."""
        done = self.tried(*arguments, given=given)
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def tried(self, *arguments: str, given: object = None) -> subprocess.CompletedProcess[str]:
        text = given if isinstance(given, str) or given is None else json.dumps(given)
        command = [str(self.programs["kubectl"]), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=PATIENCE + 30)

    def prepare(self) -> None:
        """The Task resource is known."""
        self.kubectl("apply", "-f", str(ROOT / "manifests" / "crds"))
        named = (
            "--for=jsonpath={.status.acceptedNames.kind}=Task"  # before there are conditions, none can be waited for
        )
        for true in (named, "--for=condition=Established"):
            self.kubectl("wait", true, "crd/tasks.cloudai.dev", "--timeout=60s")

    def json(self, *arguments: str) -> Json:
        found: Json = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    @contextlib.contextmanager
    def namespace(self, labels: Mapping[str, str] | None = None) -> Iterator[Place]:
        """A new namespace, given up (not waited for) in the end."""
        name = f"test-{os.getpid()}-{next(_numbers)}"
        meta = {"name": name, "labels": dict(labels or {})}
        self.kubectl("create", "-f", "-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        self.until_there(name, "serviceaccount", "default")
        place = Place(self, name)
        try:
            yield place
        finally:
            place.clear()

    def until_there(self, namespace: str, kind: str, name: str) -> None:
        self.kubectl("-n", namespace, "wait", f"{kind}/{name}", "--for=create", f"--timeout={PATIENCE}s")


@dataclass
class Place:
    kube: Kube
    name: str
    _tasks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def kubectl(self, *arguments: str, given: object = None, check: bool = True) -> str:
        return self.kube.kubectl("-n", self.name, *arguments, given=given, check=check)

    def get(self, *arguments: str) -> Json:
        return self.kube.json("-n", self.name, *arguments)

    def apply(self, script: str | None = None, **spec: Any) -> str:
        """Make a Task of the busybox image; returns its name."""
        name = f"t{next(self._tasks)}"
        wish: Json = {"image": SHELL, "userId": "ann", "resources": {"cpu": "100m", "memory": "32Mi"}}
        if script is not None:
            wish["script"] = script
        self.kubectl("create", "-f", "-", given=task(name, wish | spec))
        return name

    def until(self, name: str, phase: str, seconds: int = PATIENCE) -> Json:
        """The Task once it has come to `phase`."""
        return self._until(name, "phase", phase, seconds)

    def until_reason(self, name: str, reason: str, seconds: int = PATIENCE) -> Json:
        return self._until(name, "reason", reason, seconds)

    def _until(self, name: str, what: str, value: str, seconds: int) -> Json:
        true = f"--for=jsonpath={{.status.{what}}}={value}"
        done = self.kube.tried("-n", self.name, "wait", f"ctask/{name}", true, f"--timeout={seconds}s")
        found = self.get("ctask", name)
        assert done.returncode == 0, (
            f"{what} of {name} is not {value}: {json.dumps(found.get('status'), indent=1)}\n{done.stderr}"
        )
        return found

    def cancel(self, name: str) -> None:
        self.kubectl("patch", "ctask", name, "--type=merge", "-p", '{"spec": {"cancelRequested": true}}')

    def until_gone(self, what: str) -> None:
        self.kubectl("wait", what, "--for=delete", f"--timeout={PATIENCE}s")

    def until_written(self, pod: str, count: int) -> None:
        """Return once that many bytes of the pod's log can be read."""
        command = [str(self.kube.programs["kubectl"]), f"--kubeconfig={self.kube.kubeconfig}", "-n", self.name]
        command += ["logs", "--follow", f"--limit-bytes={count}", pod]
        told = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
        assert len(told.stdout) == count

    def log_of(self, task: str, attempt: int = 1) -> str:
        """The name of the ConfigMap that keeps that log."""
        return Log(f"{task}-{attempt}", self.get("ctask", task)["metadata"]["uid"]).kept_as

    def until_kept(self, task: str) -> None:
        """The log of the first attempt is kept."""
        self.kube.until_there(self.name, "configmap", self.log_of(task))

    def pods(self) -> list[Json]:
        found: list[Json] = self.get("pods")["items"]
        return found

    def kubeconfig_of(self, account: str, directory: Path) -> Path:
        """A kubeconfig with the rights of that service account and no others."""
        config = json.loads(self.kubectl("config", "view", "--minify", "--flatten", "--raw", "-o", "json"))
        config["users"] = [{"name": account, "user": {"token": self.kubectl("create", "token", account).strip()}}]
        config["contexts"][0]["context"]["user"] = account
        path = directory / f"{self.name}-{account}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    @contextlib.contextmanager
    def almighty(self, directory: Path) -> Iterator[Path]:
        """A kubeconfig with a token and all rights."""
        name = f"{self.name}-almighty"
        self.kubectl("create", "serviceaccount", name)
        account = f"--serviceaccount={self.name}:{name}"
        self.kubectl("create", "clusterrolebinding", name, "--clusterrole=cluster-admin", account)
        try:
            yield self.kubeconfig_of(name, directory)
        finally:
            self.kubectl("delete", "clusterrolebinding", name)

    @contextlib.contextmanager
    def policy(self, allowed: str, words: str, refused: Json) -> Iterator[None]:
        """The cluster admits only Pods of this namespace that are `allowed`, an expression in CEL; `refused` is the spec of
        one that is not.
        """
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
        here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.name}}}
        head = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": self.name}}
        policy = {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": allowed, "message": words}],
        }
        binding = {"policyName": self.name, "validationActions": ["Deny"], "matchResources": here}
        objects = [
            head | {"kind": "ValidatingAdmissionPolicy", "spec": policy},
            head | {"kind": "ValidatingAdmissionPolicyBinding", "spec": binding},
        ]
        given = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kube.kubectl("create", "-f", "-", given=given)
        try:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "refused"}, "spec": refused}
            dry = ("-n", self.name, "create", "--dry-run=server", "-f", "-")
            for _ in range(TRIES):  # nothing tells when the API server has taken it in
                if words in self.kube.tried(*dry, given=pod).stderr:
                    break
            else:
                raise AssertionError(f"a Pod is admitted that is not {allowed}")
            yield
        finally:
            self.kube.kubectl("delete", "-f", "-", given=given)

    def clear(self) -> None:
        """Delete the namespace with what is in it; Pods are let go where no operator does."""
        self.kubectl("delete", "ctask", "--all", "--wait=false")
        for pod in self.pods():
            free = '{"metadata": {"finalizers": null}}'
            self.kubectl("patch", "pod", pod["metadata"]["name"], "--type=merge", "-p", free, check=False)
        self.kube.kubectl("delete", "namespace", self.name, "--wait=false")

    @contextlib.contextmanager
    def operator(self, **settings: str) -> Iterator[Operating]:
        """A process that leads; ended in the end."""
        operating = self.start_operator(**settings)
        try:
            operating.until_it_says("This operator leads")
            yield operating
        finally:
            operating.stop()

    def start_operator(self, **settings: str) -> Operating:
        chosen = {"port": "0", "stop_grace_seconds": "2", "image_grace_seconds": "3", "namespace": self.name}
        chosen |= {"kubeconfig": str(self.kube.kubeconfig)} | settings
        environment = {f"CLOUDAI_{name.upper()}": value for name, value in chosen.items()}
        command = [sys.executable, "-m", "cloudai", "operator"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Operating(process)


class Operating:
    """An operator's process. What it says is read as it comes: a full pipe would stop it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._said: list[str] = []
        self._more = threading.Condition()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._say(line)
        self._say("")

    def _say(self, line: str) -> None:
        with self._more:
            self._said.append(line)
            self._more.notify_all()

    def until_it_says(self, words: str) -> None:
        with self._more:
            there = self._more.wait_for(lambda: any(words in line or not line for line in self._said), PATIENCE)
            assert there, f"in {PATIENCE} s only: {''.join(self._said)}"
            assert any(words in line for line in self._said), f"the operator ended: {''.join(self._said)}"

    def said(self) -> str:
        with self._more:
            return "".join(self._said)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, wait for that, and look whether something went wrong that it did not expect."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)
        self._reading.join()
        assert "Traceback" not in self.said(), self.said()


def task(name: str, spec: Json) -> Json:
    return {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "metadata": {"name": name}, "spec": spec}


def conditions(found: Json) -> dict[str, str]:
    return {one["type"]: one["status"] for one in found["status"]["conditions"]}
