"""The server's disk fills up under a whole system: tasks go on, nothing acknowledged is lost, and room brings all back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Gate, Witness

LARGE = {"user_id": "tester", "docker_image": "none", "command": "x" * 30_000, "req_cpu": 1000, "req_memory": 1}


def fill(ballast: Path) -> None:
    """Take what room there is."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def submitted_until_refused(cluster: Cluster) -> tuple[list[str], httpx.Response]:
    """The tasks that were acknowledged, and the first refusal."""
    acknowledged = []
    while (answer := cluster.http.post("/api/tasks", json=LARGE)).status_code == 200:
        acknowledged.append(answer.json()["task_id"])
    return acknowledged, answer


def known(cluster: Cluster) -> set[str]:
    answer = cluster.http.get("/api/tasks", params={"limit": 1000}).raise_for_status()
    return {task["task_id"] for task in answer.json()["tasks"]}


def test_tasks_outlive_a_full_disk_of_the_server_and_their_ends_and_logs_come_back(
    make_cluster: MakeCluster, place: Place, small_disk: Path, tmp_path: Path
) -> None:
    cluster = make_cluster(place, CLOUDAI_DATA_DIR=str(small_disk))
    api, controller = cluster.api(), cluster.controller()
    room = ("--cpu", "4", "--memory", "2", "--storage", "10")
    # What processes write is in the worker's directory and would be lost with its disk; containers' is with the engine.
    own = small_disk if place.runtime == "docker" else tmp_path
    agent = cluster.agent("worker-1", *room, "--data-dir", str(own / "worker"))
    with Witness() as witness, Gate() as gate, Gate() as later:
        command = f"echo before; {gate.wait}; echo meanwhile; {witness.say('meanwhile')}"
        short = cluster.submit(place.image, f"{command}; exit 3")
        long = cluster.submit(place.image, f"{command}; {later.wait}; echo after; exit 4")
        for task_id in (short, long):
            cluster.until(task_id, "running")
            eventually("its log is there", lambda task_id=task_id: cluster.logs(task_id) == "before\n")  # type: ignore[misc]
        before = place.alive(cluster)
        ballast = small_disk / "ballast"
        fill(ballast)
        acknowledged, refusal = submitted_until_refused(cluster)
        assert refusal.status_code == 503
        assert "full" in refusal.json()["error"]["details"]["reason"]
        eventually("the API is not ready", lambda: cluster.http.get("/readyz").status_code == 503)
        gate.open()
        eventually("both go on", lambda: len(witness.count("meanwhile")) == 2)
        ballast.unlink()
        eventually("the API is back", lambda: cluster.http.get("/readyz").status_code == 200)
        task = cluster.until(short, "failed")
        assert (task["reason"], task["exit_code"], task["attempt"]) == ("ExitCode", 3, 1)
        assert [body for body in before if body.name == f"{long}-1"] == place.alive(cluster)
        later.open()
        task = cluster.until(long, "failed")
        assert (task["reason"], task["exit_code"], task["attempt"]) == ("ExitCode", 4, 1)
    assert cluster.logs(short) == "before\nmeanwhile\n"
    assert cluster.logs(long) == "before\nmeanwhile\nafter\n"
    assert known(cluster) == {short, long, *acknowledged}
    cluster.until(cluster.submit(place.image, "true"), "completed")
    assert [part.process.poll() for part in (api, controller, agent)] == [None] * 3
