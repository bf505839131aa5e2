"""Never overcommitted, seen from the tasks' own words and in every answer about the workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.e2e.cluster import PATIENCE, Cluster
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Witness

Workers = list[dict[str, Any]]


@contextmanager
def watched(cluster: Cluster) -> Iterator[list[Workers]]:
    """Every answer of `/api/workers` while the block runs, asked for one after the other."""
    seen: list[Workers] = []
    over = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=cluster.url, timeout=PATIENCE) as http:
            while not over.is_set():
                seen.append(http.get("/api/workers").raise_for_status().json()["workers"])

    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(look)
        try:
            yield seen
        finally:
            over.set()
            looking.result()


def check(seen: list[Workers]) -> None:
    """Whatever was seen of a worker adds up, and is within what it has."""
    for worker in (each for workers in seen for each in workers):
        for what in ("cpu", "memory", "storage", "gpu"):
            held, free, whole = (worker[f"{prefix}_{what}"] for prefix in ("allocated", "available", "total"))
            assert 0 <= held <= whole, worker
            assert held + free == whole, worker


def test_fifty_tasks_at_once_never_exceed_either_of_two_workers(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place)
    cluster.api()
    cluster.controller()
    gpus = (
        ("--gpu", "2") if place.runtime == "process" else ()
    )  # an engine without a driver starts none that ask for one
    for worker_id in ("worker-1", "worker-2"):
        cluster.agent(worker_id, "--cpu", "1", "--memory", "1", "--storage", "1", *gpus)
    with Witness() as witness, watched(cluster) as seen, ThreadPoolExecutor(10) as submitters:
        command = f"{witness.say('start')}; sleep 0.2; {witness.say('end')}"
        wish = {"req_cpu": 0.25, "req_memory": 0.1, "req_storage": 0.1, "req_gpu": 0.5 if gpus else 0}
        tasks = list(submitters.map(lambda _: cluster.submit(place.image, command, **wish), range(50)))
        finished = cluster.finished(tasks)
    assert {task["status"] for task in finished} == {"completed"}
    workers = {task["task_id"]: task["worker_id"] for task in finished}
    assert set(workers.values()) == {"worker-1", "worker-2"}
    for worker_id in set(workers.values()):
        live = 0
        for sighting in sorted(witness.sightings, key=lambda sighting: sighting.at):
            if workers[sighting.task_id] == worker_id:
                live += 1 if sighting.word == "start" else -1
                assert live <= 4  # 4 × 0.25 of one core
    assert set(witness.count("start").values()) == {1}
    check(seen)
    held = [worker["allocated_cpu"] for workers in seen for worker in workers]
    assert max(held) == 1  # they were full
