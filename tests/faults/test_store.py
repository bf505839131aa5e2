"""The place of the store fails under a whole system: it says so, loses nothing that it acknowledged, and goes on by itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place, Processes
from tests.e2e.witness import Witness
from tests.engines.postgres import Postgres

LONG = {
    "user_id": "tester",
    "docker_image": "busybox",
    "command": "x" * 30_000,
    "req_cpu": 1000,
    "req_memory": 1,
    "req_storage": 0,
    "req_gpu": 0,
}


def refused(answer: httpx.Response) -> str:
    """The reason in a 503 of the documented form."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    return str(answer.json()["error"]["details"]["reason"])


@pytest.fixture
def processes() -> Place:
    return Processes()


def test_a_full_disk_answers_503_and_loses_nothing(
    make_cluster: MakeCluster, processes: Place, small_disk: Path
) -> None:
    cluster = make_cluster(processes, CLOUDAI_DATA_DIR=str(small_disk))
    cluster.api()
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_000_000)
    acknowledged = []
    while (answer := cluster.http.post("/api/tasks", json=LONG)).status_code == 200:
        acknowledged.append(answer.json()["task_id"])
    assert "full" in refused(answer)
    assert cluster.task(acknowledged[-1])["status"] == "queued"
    ballast.unlink()
    eventually("the API is back", lambda: cluster.http.get("/readyz").status_code == 200)
    acknowledged.append(cluster.http.post("/api/tasks", json=LONG).raise_for_status().json()["task_id"])
    assert {task["task_id"] for task in listed(cluster)} == set(acknowledged)


def listed(cluster: Cluster) -> list[dict[str, str]]:
    return list(cluster.http.get("/api/tasks", params={"limit": 1000}).raise_for_status().json()["tasks"])


def test_a_database_server_that_was_away_disturbs_no_task(make_cluster: MakeCluster, place: Place) -> None:
    with Postgres() as server, Witness() as witness:
        cluster = make_cluster(place, CLOUDAI_DATABASE_URL=server.create("cloudai"))
        cluster.start_all()
        task_id = cluster.submit(place.image, f"echo before; {witness.say('start')}; sleep 4; echo after")
        eventually("it started", lambda: witness.count("start")[task_id])
        server.stop()
        eventually("the API notices", lambda: cluster.http.get("/readyz").status_code == 503)
        verdict = cluster.http.get("/readyz").json()
        assert verdict["ready"] is False
        assert verdict["checks"]["store"] != "ok"
        assert "unknown" in verdict["checks"]["controller"]
        refused(cluster.http.post(f"/api/tasks/{task_id}/cancel"))
        refused(cluster.http.get(f"/api/tasks/{task_id}"))
        server.start()
        eventually("the API is back", lambda: cluster.http.get("/readyz").status_code == 200)
        task = eventually("it completed", lambda: completed(cluster, task_id))
        assert (task["attempt"], task["exit_code"]) == (1, 0)
        assert cluster.logs(task_id) == "before\nafter\n"
        assert witness.count("start") == {task_id: 1}
        cluster.until(cluster.submit(place.image, "true"), "completed")


def completed(cluster: Cluster, task_id: str) -> dict[str, object] | None:
    with contextlib.suppress(AssertionError):  # still 503
        task = cluster.task(task_id)
        return task if task["status"] == "completed" else None
    return None
