"""Cancelled means stopped: whenever the cancel comes, the task ends `cancelled` and nothing of it is left."""

from __future__ import annotations

import random
import socket

import pytest

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker, Place


def test_a_queued_task_is_cancelled_at_once(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place)
    cluster.api()
    task_id = cluster.submit(place.image, "true")
    answer = cluster.cancel(task_id)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert cluster.task(task_id)["status"] == "cancelled"
    assert cluster.cancel(task_id).status_code == 200


def test_a_running_task_is_cancelled_once_its_container_is_gone(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "echo here; sleep 600")
    cluster.until(task_id, "running")
    answer = cluster.cancel(task_id)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    task = cluster.until(task_id, "cancelled")
    assert task["reason"] == "Cancelled"
    eventually("nothing is left", lambda: not place.running(cluster))
    assert cluster.logs(task_id) == "here\n"


def test_a_task_that_ignores_the_request_to_end_is_killed(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "trap '' TERM; echo deaf; while true; do sleep 1; done")
    eventually("it is deaf", lambda: "deaf" in cluster.logs(task_id))
    cluster.cancel(task_id)
    cluster.until(task_id, "cancelled")
    eventually("nothing is left", lambda: not place.running(cluster))


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
        cluster.cancel(task_id)
        cluster.until(task_id, "cancelled")
    assert not docker_place.running(cluster)
