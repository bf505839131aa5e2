"""A worker that falls silent is told of, gets nothing new and keeps what it has; heard again, it goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Gate

Told = list[tuple[str, str]]  # kind of message and worker


@contextmanager
def listening(cluster: Cluster) -> Iterator[Told]:
    """What the WebSocket tells of workers from now on."""
    told: Told = []
    with connect(f"ws://127.0.0.1:{cluster.port}/ws/telemetry", proxy=None) as socket:

        def listen() -> None:
            try:
                for text in socket:
                    message = json.loads(text)
                    if message["type"].startswith("worker_"):
                        told.append((message["type"], message["data"]["worker_id"]))
            except ConnectionClosed:
                return

        thread = threading.Thread(target=listen)
        for _ in range(2):  # the second update comes from the work behind, which has looked by then
            socket.recv()
        thread.start()
        try:
            yield told
        finally:
            socket.close()
            thread.join()


def test_a_silent_worker_is_told_of_gets_nothing_new_and_goes_on_when_it_is_back(
    make_cluster: MakeCluster, place: Place
) -> None:
    cluster = make_cluster(place, CLOUDAI_HEARTBEAT_SECONDS="0.5", CLOUDAI_TELEMETRY_SECONDS="0.2")
    cluster.start_all()
    with Gate() as gate, listening(cluster) as told:
        task_id = cluster.submit(place.image, f"echo before; {gate.wait}; echo after")
        cluster.until(task_id, "running")
        eventually("its log is there", lambda: cluster.logs(task_id) == "before\n")
        before = place.alive(cluster)
        cluster.parts[-1].kill()
        eventually("it is inactive", lambda: not cluster.worker("worker-1")["is_active"])
        eventually("its silence is told", lambda: ("worker_disconnected", "worker-1") in told)
        waiting = cluster.submit(place.image, "true")
        assert [cluster.task(each)["status"] for each in (task_id, waiting)] == ["running", "queued"]
        assert cluster.task(waiting)["reason"] == "NoWorkers"
        del told[:]
        cluster.agent()
        eventually("it is told to be back", lambda: ("worker_registered", "worker-1") in told)
        cluster.until(waiting, "completed")
        assert place.alive(cluster) == before
        gate.open()
        task = cluster.until(task_id, "completed")
    assert (task["attempt"], task["exit_code"]) == (1, 0)
    assert cluster.logs(task_id) == "before\nafter\n"


def test_a_task_goes_to_the_worker_that_is_heard_of(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place, CLOUDAI_HEARTBEAT_SECONDS="0.5")
    cluster.start_all()
    silent = cluster.parts[-1]
    cluster.agent("worker-2", "--cpu", "64", "--memory", "64", "--storage", "10")  # the worse fit
    silent.kill()
    eventually("it is inactive", lambda: not cluster.worker("worker-1")["is_active"])
    task = cluster.until(cluster.submit(place.image, "true"), "completed")
    assert task["worker_id"] == "worker-2"
