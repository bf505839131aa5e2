"""The engine goes away and comes back: the worker says so, starts nothing meanwhile, and finds its containers again."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker
from tests.e2e.witness import Gate, Witness
from tests.engines.dockerd import PrivateDocker
from tests.engines.images import build_busybox

pytestmark = pytest.mark.docker


@pytest.fixture
def engine() -> Iterator[PrivateDocker]:
    with PrivateDocker() as engine:
        yield engine


@pytest.fixture
def lasting() -> Iterator[PrivateDocker]:
    """An engine whose containers go on while it is stopped."""
    with PrivateDocker(live_restore=True) as engine:
        yield engine


def working(make_cluster: MakeCluster, engine: PrivateDocker) -> tuple[Cluster, Docker]:
    place = Docker(engine.host, build_busybox(engine.host))
    cluster = make_cluster(place)
    cluster.start_all()
    return cluster, place


def asked(cluster: Cluster, path: str) -> tuple[int, str]:
    """Status and text of the agent's own endpoint."""
    answer = httpx.get(f"http://{cluster.worker('worker-1')['worker_ip']}{path}")
    return answer.status_code, answer.text


def until_down(cluster: Cluster) -> None:
    """Wait until the worker says that its engine is away, to the server and to who asks it."""
    eventually("the worker says so", lambda: not cluster.worker("worker-1")["is_active"])
    assert "Docker engine" in cluster.worker("worker-1")["problem"]
    # The words change while an engine goes, so both are looked at again.
    eventually("both say the same", lambda: asked(cluster, "/readyz") == (503, f"{said(cluster)}\n"))
    assert asked(cluster, "/healthz") == (200, "ok\n")
    assert "cloudai_agent_connected 1.0" in asked(cluster, "/metrics")[1]


def said(cluster: Cluster) -> str:
    """What the server knows of the worker's problem."""
    return str(cluster.worker("worker-1")["problem"])


def until_back(cluster: Cluster) -> None:
    eventually("the worker is back", lambda: cluster.worker("worker-1")["is_active"])
    assert cluster.worker("worker-1")["problem"] is None
    assert asked(cluster, "/readyz") == (200, "ready\n")


def test_containers_that_outlive_a_restart_of_their_engine_are_not_disturbed(
    lasting: PrivateDocker, make_cluster: MakeCluster
) -> None:
    cluster, place = working(make_cluster, lasting)
    assert asked(cluster, "/readyz") == (200, "ready\n")
    with Witness() as witness, Gate() as gate, Gate() as later:
        command = f"echo before; {witness.say('start')}; {gate.wait}; echo meanwhile; {witness.say('on')}"
        task_id = cluster.submit(place.image, f"{command}; {later.wait}; echo after")
        cluster.until(task_id, "running")
        eventually("its log is there", lambda: cluster.logs(task_id) == "before\n")
        before = place.alive(cluster)
        lasting.stop()
        until_down(cluster)
        gate.open()
        eventually("it goes on without its engine", lambda: witness.count("on")[task_id])
        lasting.start()
        until_back(cluster)
        assert place.alive(cluster) == before
        later.open()
        task = cluster.until(task_id, "completed")
    assert (task["attempt"], task["exit_code"]) == (1, 0)
    assert cluster.logs(task_id) == "before\nmeanwhile\nafter\n"
    assert witness.count("start") == {task_id: 1}
    eventually("nothing is left", lambda: not place.running(cluster))


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_containers_that_their_engine_ended_are_failures_of_one_attempt(
    engine: PrivateDocker, make_cluster: MakeCluster, ending: str
) -> None:
    """An engine that is stopped sends them TERM; what outlived one that was killed gets it from the one that comes after."""
    cluster, place = working(make_cluster, engine)
    with Witness() as witness:
        task_id = cluster.submit(place.image, f"echo before; {witness.say('start')}; sleep 600")
        cluster.until(task_id, "running")
        eventually("its log is there", lambda: cluster.logs(task_id) == "before\n")
        getattr(engine, ending)()
        until_down(cluster)
        waiting = cluster.submit(place.image, "true")
        assert cluster.task(waiting)["reason"] == "NoWorkers"
        engine.start()
        until_back(cluster)
        cluster.until(waiting, "completed")
        task = cluster.until(task_id, "failed")
    assert (task["reason"], task["exit_code"], task["attempt"]) == ("ExitCode", 143, 1)
    assert task["message"] == "The command ended with exit code 143 (signal 15); see its logs."
    assert cluster.logs(task_id) == "before\n"
    assert witness.count("start") == {task_id: 1}
    eventually("nothing is left", lambda: not place.running(cluster))


def test_what_ended_just_before_its_engine_was_killed_is_a_success(
    engine: PrivateDocker, make_cluster: MakeCluster
) -> None:
    cluster, place = working(make_cluster, engine)
    agent = cluster.parts[-1]
    with Gate() as gate:
        task_id = cluster.submit(place.image, f"echo before; {gate.wait}; echo after")
        cluster.until(task_id, "running")
        agent.pause()  # it shall hear of the end from the next engine only
        gate.open()
        eventually("it ended", lambda: not place.alive(cluster))
        engine.kill()
        agent.resume()
        until_down(cluster)
        engine.start()
        task = cluster.until(task_id, "completed")
    assert (task["exit_code"], task["attempt"]) == (0, 1)
    assert cluster.logs(task_id) == "before\nafter\n"
    eventually("nothing is left", lambda: not place.running(cluster))


def test_what_ended_while_its_engine_was_away_is_told_when_it_is_back(
    lasting: PrivateDocker, make_cluster: MakeCluster
) -> None:
    cluster, place = working(make_cluster, lasting)
    with Witness() as witness, Gate() as gate:
        task_id = cluster.submit(place.image, f"echo before; {gate.wait}; {witness.say('end')}; exit 3")
        cluster.until(task_id, "running")
        eventually("its log is there", lambda: cluster.logs(task_id) == "before\n")
        (container,) = place.containers(cluster)
        pid = container.attrs["State"]["Pid"]
        lasting.stop()
        until_down(cluster)
        gate.open()
        eventually("it ends", lambda: witness.count("end")[task_id] and not psutil.pid_exists(pid))
        lasting.start()
        until_back(cluster)
        task = cluster.until(task_id, "failed")
    assert (task["reason"], task["exit_code"], task["attempt"]) == ("ExitCode", 3, 1)
    assert cluster.logs(task_id) == "before\n"
    eventually("nothing is left", lambda: not place.running(cluster))
