"""Never overcommitted, seen from the tasks' own words."""

from __future__ import annotations

from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Witness


def test_fifty_tasks_on_two_workers_never_exceed_either(make_cluster: MakeCluster, place: Place) -> None:
    cluster = make_cluster(place)
    cluster.api()
    cluster.controller()
    for worker_id in ("worker-1", "worker-2"):
        cluster.agent(worker_id, "--cpu", "1", "--memory", "1", "--storage", "1")
    with Witness() as witness:
        command = f"{witness.say('start')}; sleep 0.2; {witness.say('end')}"
        tasks = [cluster.submit(place.image, command, req_cpu=0.25) for _ in range(50)]
        finished = cluster.finished(tasks)
    assert {task["status"] for task in finished} == {"completed"}
    workers = {task["task_id"]: task["worker_id"] for task in finished}
    assert set(workers.values()) == {"worker-1", "worker-2"}
    for worker_id in set(workers.values()):
        live = 0
        for seen in sorted(witness.sightings, key=lambda sighting: sighting.at):
            if workers[seen.task_id] == worker_id:
                live += 1 if seen.word == "start" else -1
                assert live <= 4  # 4 × 0.25 of one core
    assert set(witness.count("start").values()) == {1}
