"""At most one live attempt: a worker that is cut off stops its containers before they start elsewhere."""

from __future__ import annotations

from functools import partial

import pytest

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker, Place
from tests.e2e.witness import Witness
from tests.engines.proxy import Proxy

LEASE = {"CLOUDAI_LEASE_SECONDS": "4"}


@pytest.mark.timeout(240)
def test_a_worker_cut_off_for_longer_than_the_lease_has_stopped_before_the_next_attempt_starts(
    make_cluster: MakeCluster, place: Place
) -> None:
    cluster = make_cluster(place, **LEASE)
    cluster.api()
    cluster.controller()
    with Proxy(cluster.port) as proxy, Witness() as witness:
        cluster.agent("worker-1", server=f"http://127.0.0.1:{proxy.port}")
        # It ignores TERM, so only the kill after the grace ends it.
        command = f"trap '' TERM; while true; do {witness.say('alive')}; sleep 0.1; done"
        task_id = cluster.submit(place.image, command)
        eventually("the first attempt runs", lambda: witness.times(task_id, 1))
        cluster.agent("worker-2")
        proxy.cut()
        eventually("the second attempt runs", lambda: witness.times(task_id, 2))
        assert max(witness.times(task_id, 1)) < min(witness.times(task_id, 2))
        task = cluster.until(task_id, "running")
        assert (task["attempt"], task["worker_id"]) == (2, "worker-2")
        proxy.mend()
        eventually("worker-1 is back", lambda: cluster.worker("worker-1")["is_active"])
        eventually("the first container is gone", lambda: f"{task_id}-1" not in place.running(cluster))
        cluster.cancel(task_id)
        cluster.until(task_id, "cancelled")


@pytest.mark.timeout(240)
def test_without_retries_a_task_is_failed_with_its_lost_worker(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place, **LEASE)
    cluster.api()
    cluster.controller()
    with Proxy(cluster.port) as proxy:
        cluster.agent("worker-1", server=f"http://127.0.0.1:{proxy.port}")
        task_id = cluster.submit(place.image, "echo here; sleep 600", max_retries=0)
        eventually("it runs", lambda: cluster.logs(task_id) == "here\n")
        proxy.cut()
        task = cluster.until(task_id, "failed")
        assert place.alive(cluster) == []
    assert (task["reason"], task["attempt"], task["exit_code"]) == ("WorkerLost", 1, None)
    assert task["message"] == (
        "Worker worker-1 sent no heartbeat for longer than its lease; check that the machine is up and reaches the "
        "server. No attempt is left; submit it again, with `max_retries` where it may run more than once."
    )
    assert cluster.logs(task_id) == "here\n"


@pytest.mark.docker
@pytest.mark.timeout(240)
def test_a_lost_task_is_tried_once_more_and_the_second_loss_is_its_end(
    make_cluster: MakeCluster, docker_place: Docker
) -> None:
    place = docker_place
    cluster = make_cluster(place, **LEASE)
    cluster.api()
    cluster.controller()
    with Proxy(cluster.port) as proxy:
        cluster.agent("worker-1", server=f"http://127.0.0.1:{proxy.port}")
        task_id = cluster.submit(place.image, "echo here; sleep 600")
        for attempt in (1, 2):
            eventually("it runs", partial(runs, cluster, task_id, attempt))
            proxy.cut()
            eventually("the worker stops it", lambda: not place.alive(cluster))
            proxy.mend()  # before the controller gives the worker up: the worker tells it itself
        task = cluster.until(task_id, "failed")
    assert (task["reason"], task["attempt"]) == ("WorkerLost", 2)
    assert task["message"] == (
        "The worker was cut off for longer than its lease and stopped the container; check its network to the server. "
        "It was attempt 2, the last."
    )
    assert [cluster.logs(task_id, attempt=attempt) for attempt in (1, 2)] == ["here\n"] * 2


def runs(cluster: Cluster, task_id: str, attempt: int) -> bool:
    task = cluster.task(task_id)
    return (task["status"], task["attempt"]) == ("running", attempt) and cluster.logs(task_id) == "here\n"
