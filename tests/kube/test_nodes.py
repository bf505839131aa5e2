"""What becomes of tasks when Kubernetes takes their node or their place away: on played nodes, with the real control plane."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloudai.store.kube.task_resource import Json, instant
from tests.cluster.cluster import played_node
from tests.engines import missing
from tests.kube.kube import Kube, Operating, Place

pytestmark = pytest.mark.usefixtures("operator")
GOES_ON = {"annotations": {"play.cloudai.dev/end": "never"}}


class Nodes:
    """Played nodes for the tasks of one namespace."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._numbers = itertools.count(1)
        self.names: list[str] = []

    def add(self, cores: int = 32) -> str:
        return self._add(lambda name: played_node(name, cores, place=self._place.name))

    def add_mute(self) -> str:
        """A node that was ready once, of which nobody ever tells anything again, or sees to its pods."""
        return self._add(lambda name: _mute(played_node(name, place=self._place.name)))

    def _add(self, of: Callable[[str], Json]) -> str:
        name = f"{self._place.name}-node-{next(self._numbers)}"
        self.names.append(name)
        self._place.kubectl("create", "-f", "-", given=of(name))
        self._place.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=60s")
        return name

    def task(self, cpu: str = "1", **pod: Any) -> str:
        """A task that goes on until it is ended, and gives up on a silent node after a second."""
        tolerations = [{"key": "played", "operator": "Exists"}]
        silent = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "tolerationSeconds": 1}
        wish = {"nodeSelector": {"place": self._place.name}, **GOES_ON, **pod}
        wish["tolerations"] = [*tolerations, {"operator": "Exists", **silent}]
        return self._place.apply(pod=wish, resources={"cpu": cpu, "memory": "64Mi"})

    def began(self, pod: str) -> None:
        """What a mute node would have said of a pod before."""
        self._place.kubectl("wait", "--for=create", f"pod/{pod}", "--timeout=60s")
        self._place.kubectl("wait", "--for=condition=PodScheduled", f"pod/{pod}", "--timeout=60s")
        [container] = self._place.get("pod", pod)["spec"]["containers"]
        now = instant(time.time_ns() // 1_000_000)[:19] + "Z"
        said = {"name": container["name"], "image": container["image"], "imageID": "", "ready": True, "restartCount": 0}
        said["state"] = {"running": {"startedAt": now}}
        status = json.dumps({"status": {"phase": "Running", "startTime": now, "containerStatuses": [said]}})
        self._place.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "-p", status)

    def close(self) -> None:
        self._place.kubectl("delete", "node", "--ignore-not-found", *self.names)


def _mute(node: Json) -> Json:
    """Without a player, and as ready as the first word of a kubelet makes it."""
    del node["metadata"]["annotations"]
    node["status"]["conditions"] = [{"type": "Ready", "status": "True", "reason": "Said", "message": "said once"}]
    return node


@pytest.fixture
def nodes(kube: Kube, place: Place, operator: Operating) -> Iterator[Nodes]:
    if kube.own is None:
        missing("Played nodes", "unset CLOUDAI_TEST_KUBECONFIG")
    assert operator.process.poll() is None
    with contextlib.closing(Nodes(place)) as nodes:
        yield nodes


def runs(place: Place, name: str, attempt: int) -> str:
    """Wait until that attempt runs; returns its node."""
    what = f"--for=jsonpath={{.status.attempt}}={attempt}"
    place.kubectl("wait", what, f"ctask/{name}", "--timeout=120s")
    return str(place.until(name, "Running")["status"]["node"])


def reasons(place: Place, name: str) -> list[str | None]:
    return [one.get("reason") for one in place.get("ctask", name)["status"]["attempts"]]


@pytest.mark.timeout(400)
def test_tasks_of_lost_nodes_run_again_elsewhere_once_they_cannot_live_any_more(place: Place, nodes: Nodes) -> None:
    going_away = nodes.add()
    orphaned = nodes.task()
    assert runs(place, orphaned, 1) == going_away
    place.kubectl("cordon", going_away)
    going_silent = nodes.add_mute()
    silenced = nodes.task()
    nodes.began(f"{silenced}-1")
    assert runs(place, silenced, 1) == going_silent
    place.kubectl("cordon", going_silent)
    spare = nodes.add()

    place.kubectl("delete", "node", going_away)

    assert runs(place, orphaned, 2) == spare
    assert reasons(place, orphaned) == ["WorkerLost"]

    told = place.until_reason(silenced, "WorkerInactive")
    assert told["status"]["phase"] == "Running"  # for all that anybody can know
    assert "does not answer" in told["status"]["message"]
    pods = [pod["metadata"]["name"] for pod in place.pods() if pod["metadata"]["name"].startswith(f"{silenced}-")]
    assert pods == [f"{silenced}-1"]

    place.kubectl("taint", "node", going_silent, "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
    assert runs(place, silenced, 2) == spare
    assert reasons(place, silenced) == ["WorkerLost"]


def test_a_drained_node_lets_its_tasks_run_elsewhere(place: Place, nodes: Nodes) -> None:
    drained = nodes.add()
    name = nodes.task()
    assert runs(place, name, 1) == drained
    other = nodes.add()
    place.kubectl("drain", drained, "--timeout=60s")
    assert runs(place, name, 2) == other
    assert reasons(place, name) == ["Evicted"]


def test_a_task_that_gave_way_to_a_more_urgent_one_runs_after_it(place: Place, nodes: Nodes) -> None:
    urgent = f"{place.name}-urgent"
    order = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": urgent}, "value": 9}
    place.kubectl("create", "-f", "-", given=order)
    try:
        nodes.add(cores=1)
        waiting = nodes.task(cpu="900m")
        runs(place, waiting, 1)
        pressing = nodes.task(cpu="900m", priorityClassName=urgent)
        runs(place, pressing, 1)
        assert reasons(place, waiting) == ["Preempted"]
        place.cancel(pressing)
        runs(place, waiting, 2)
        assert place.get("ctask", pressing)["status"].get("attempt") == 1
    finally:
        place.kubectl("delete", "priorityclass", urgent)
