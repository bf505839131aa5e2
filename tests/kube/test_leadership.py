"""Several operators: one leads, another one takes over, and whatever happens to them every task runs once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime

import pytest

from cloudai_controller.kube.lease import DURATION, EARLIER
from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube.kube import Operating, Place, task

TASKS = 200
KILLS = 4
MOST_WRITES = 4  # of the status of a task that runs once
ON_PLAYED_NODES = {
    "nodeSelector": {"type": "played"},
    "tolerations": [{"key": "played", "operator": "Exists"}],
}


def test_when_the_leader_is_killed_another_operator_takes_over(place: Place) -> None:
    with place.operator() as leading:
        waiting = place.start_operator()
        try:
            going = place.apply("sleep 20")
            place.until(going, "Running")
            leading.kill()
            before = place.get("lease", "cloudai-controller")["spec"]
            late = place.apply("true")
            waiting.until_it_says("This operator leads")
            after = place.get("lease", "cloudai-controller")["spec"]
            place.until(late, "Completed")
            assert place.until(going, "Completed")["status"]["attempt"] == 1
        finally:
            waiting.stop()
    free = (datetime.fromisoformat(after["acquireTime"]) - datetime.fromisoformat(before["renewTime"])).total_seconds()
    print("taken over", free, "s after the last renewal")
    assert DURATION - EARLIER < free < 2 * DURATION  # DURATION, and what a machine that is busy with tests adds


def test_an_operator_that_ends_lets_another_one_lead_at_once(place: Place) -> None:
    with place.operator() as leading:
        waiting = place.start_operator()
        try:
            leading.stop()
            waiting.until_it_says("This operator leads")
            place.until(place.apply("true"), "Completed")
        finally:
            waiting.stop()


def test_a_leader_that_was_asleep_beyond_its_lease_does_nothing_when_it_wakes(place: Place) -> None:
    with place.operator() as leading:
        waiting = place.start_operator()
        try:
            leading.process.send_signal(signal.SIGSTOP)
            name = place.apply("sleep 1000")
            waiting.until_it_says("This operator leads")
            place.until(name, "Running")
            leading.process.send_signal(signal.SIGCONT)
            leading.until_it_says("the lease was lost")
            assert place.get("ctask", name)["status"]["phase"] == "Running"
            assert [pod["metadata"]["name"] for pod in place.pods()] == [f"{name}-1"]
        finally:
            leading.process.send_signal(signal.SIGCONT)
            waiting.stop()


@pytest.mark.timeout(400)
def test_leaders_killed_at_random_instants_run_every_task_once(place: Place) -> None:
    if place.kube.own is None:
        missing("Played nodes", "unset CLOUDAI_TEST_KUBECONFIG")
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    pods = Watched(place)
    spec = {"image": SHELL, "userId": "ann", "resources": {"cpu": "10m", "memory": "16Mi"}, "pod": ON_PLAYED_NODES}
    tasks = {"apiVersion": "v1", "kind": "List", "items": [task(f"n{number}", spec) for number in range(TASKS)]}
    operators: list[Operating] = [place.start_operator()]
    try:
        operators[-1].until_it_says("This operator leads")
        making = threading.Thread(target=place.kubectl, args=("create", "-f", "-"), kwargs={"given": tasks})
        making.start()
        for _ in range(KILLS):  # the last one while tasks end and are tidied up after
            operators.append(place.start_operator())
            pods.until(len(pods.seen) + chance.randrange(1, 2 * TASKS // KILLS))
            operators[-2].kill()
            place.kubectl("delete", "lease/cloudai-controller")  # which nobody renews any more
            operators[-1].until_it_says("This operator leads")
        making.join()
        place.kubectl("wait", "--for=condition=Succeeded", "ctask", "--all", "--timeout=120s")
        pods.until(TASKS)  # the watch may be told later than the wait was
    finally:
        for operator in operators:
            operator.stop()
        seen = pods.stop()
    assert len(seen) == TASKS
    assert {name for name, _ in seen} == {f"n{number}-1" for number in range(TASKS)}
    tried = list(written(place))
    # Of a write whose operator was killed before the answer, the record may say that it failed.
    assert {name for name, _ in tried} == {f"n{number}" for number in range(TASKS)}
    assert max(Counter(name for name, code in tried if code == 200).values()) <= MOST_WRITES


def written(place: Place) -> Iterator[tuple[str, int]]:
    """The Task and the HTTP status of each write to a status, by the API server's own record."""
    assert place.kube.own is not None
    status = {"namespace": place.name, "resource": "tasks", "subresource": "status"}
    with place.kube.own.audit.open() as log:
        for line in log:
            event = json.loads(line) if place.name in line else {}
            what = event.get("objectRef", {})
            if status.items() <= what.items():
                yield what["name"], event["responseStatus"]["code"]


class Watched:
    """Every Pod of a namespace that ever was: its name and uid.

    The API server ends a watch that lags behind, which kubectl does not take up again.
    """

    def __init__(self, place: Place) -> None:
        columns = "custom-columns=NAME:.metadata.name,UID:.metadata.uid"
        kubectl = [str(place.kube.programs["kubectl"]), f"--kubeconfig={place.kube.kubeconfig}", "-n", place.name]
        self._command = [*kubectl, "get", "pods", "--watch", "--no-headers", "-o", columns]
        self.seen: set[tuple[str, str]] = set()
        self._more = threading.Condition()
        self._stopped = False
        self._process = self._started()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def _read(self) -> None:
        while True:
            with self._process as process:
                assert process.stdout is not None
                for line in process.stdout:
                    name, uid = line.split()
                    with self._more:
                        self.seen.add((name, uid))
                        self._more.notify_all()
            with self._more:
                if self._stopped:
                    return
                self._process = self._started()

    def until(self, count: int) -> None:
        with self._more:
            there = self._more.wait_for(lambda: len(self.seen) >= min(count, TASKS), timeout=90)
            assert there, f"{len(self.seen)} Pods were made, not {count}"

    def stop(self) -> set[tuple[str, str]]:
        with self._more:
            self._stopped = True
            self._process.terminate()
        self._thread.join()
        return self.seen
