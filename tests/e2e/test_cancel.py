"""Cancelled means stopped: whenever the cancel comes, the task ends `cancelled` and nothing of it is left."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import PATIENCE, Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker, Place
from tests.engines.dockerproxy import CREATE, START, DockerProxy


def test_a_queued_task_is_cancelled_at_once(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place)
    cluster.api()
    task_id = cluster.submit(place.image, "true")
    answer = cluster.cancel(task_id)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert cluster.task(task_id)["status"] == "cancelled"
    assert cluster.cancel(task_id).status_code == 200


@contextlib.contextmanager
def busy(cluster: Cluster) -> Iterator[None]:
    """The agent does nothing within the block, so that a cancel finds the container as it is."""
    agent = cluster.parts[-1]
    agent.pause()
    try:
        yield
    finally:
        agent.resume()


def acknowledged(cluster: Cluster, task_id: str) -> None:
    """Cancel, and have the documented answer."""
    answer = cluster.cancel(task_id)
    assert answer.status_code == 200
    documented = {"task_id": task_id, "status": "cancelled", "message": "Task cancellation requested"}
    assert answer.json().items() >= documented.items()


def until_cancelled(cluster: Cluster, place: Place, task_id: str) -> None:
    """Wait for the end; at that very instant nothing of the task may run."""
    task = cluster.until(task_id, "cancelled")
    assert place.alive(cluster) == []
    assert (task["reason"], task["cancel_requested"]) == ("Cancelled", True)
    eventually("nothing is left", lambda: not place.running(cluster))


def test_a_running_task_reads_running_until_its_container_has_ended(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "echo here; sleep 600")
    cluster.until(task_id, "running")
    with busy(cluster):
        acknowledged(cluster, task_id)
        task = cluster.task(task_id)
        assert (task["status"], task["cancel_requested"]) == ("running", True)
        assert place.alive(cluster)
    until_cancelled(cluster, place, task_id)
    assert cluster.logs(task_id) == "here\n"


def test_a_task_that_ignores_the_request_to_end_is_killed(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "trap '' TERM; echo deaf; while true; do sleep 1; done")
    eventually("it is deaf", lambda: "deaf" in cluster.logs(task_id))
    cluster.until(task_id, "running")
    with busy(cluster):
        acknowledged(cluster, task_id)
        task = cluster.task(task_id)
        assert (task["status"], task["cancel_requested"]) == ("running", True)
        assert place.alive(cluster)
    until_cancelled(cluster, place, task_id)
    assert cluster.task(task_id)["exit_code"] == 137


def test_an_agent_that_is_ended_does_not_wait_for_what_it_stops(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place, CLOUDAI_STOP_GRACE_SECONDS="600")
    cluster.start_all()
    task_id = cluster.submit(place.image, "trap 'echo asked' TERM; while :; do sleep 0.05; done")
    cluster.until(task_id, "running")
    cluster.cancel(task_id)
    eventually("it is asked to end", lambda: "asked" in cluster.logs(task_id))
    cluster.parts[-1].stop()
    assert place.alive(cluster) != []


def test_a_cancel_at_any_instant_leaves_nothing(cluster: Cluster, place: Place) -> None:
    chance = random.Random(20)
    tasks = []
    for _ in range(20):
        task_id = cluster.submit(place.image, "sleep 600")
        # The cancel falls into whatever the worker is doing just then: create, start, run.
        for _ in range(chance.randrange(60)):
            cluster.http.get("/healthz")
        assert cluster.cancel(task_id).status_code == 200
        tasks.append(task_id)
    assert [task["status"] for task in cluster.finished(tasks)] == ["cancelled"] * 20
    assert place.alive(cluster) == []
    eventually("nothing is left", lambda: not place.running(cluster))


def test_a_finished_task_cannot_be_cancelled(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "true")
    cluster.until(task_id, "completed")
    answer = cluster.cancel(task_id)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "TASK_FINISHED")


@pytest.mark.docker
def test_a_cancel_during_the_pull_ends_the_pull(make_cluster: MakeCluster, docker_place: Docker) -> None:
    cluster = make_cluster(docker_place)
    cluster.start_all()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a registry that never answers
        task_id = cluster.submit(f"127.0.0.1:{silent.getsockname()[1]}/some/image:1", "true")
        eventually("the pull began", lambda: "Pulling" in (cluster.task(task_id)["message"] or ""))
        acknowledged(cluster, task_id)
        cluster.until(task_id, "cancelled")
    assert not docker_place.running(cluster)


@pytest.mark.docker
@pytest.mark.parametrize("call", [CREATE, START], ids=["create", "start"])
def test_a_cancel_while_the_engine_is_about_to_start_leaves_nothing(
    make_cluster: MakeCluster, docker_place: Docker, call: str
) -> None:
    with DockerProxy(docker_place.host) as engine:
        cluster = make_cluster(docker_place, DOCKER_HOST=engine.host)
        cluster.start_all()
        with engine.holding(call) as arrived:
            task_id = cluster.submit(docker_place.image, "echo started; sleep 600")
            assert arrived.wait(PATIENCE)
            acknowledged(cluster, task_id)
            controller = cluster.parts[1]
            eventually("the run is to stop", lambda: f"{task_id}: attempt 1 is to stop" in controller.log.read_text())
            task = cluster.task(task_id)
            assert (task["status"], task["cancel_requested"]) == ("pending", True)
        until_cancelled(cluster, docker_place, task_id)
        cluster.close()  # before its engine goes
