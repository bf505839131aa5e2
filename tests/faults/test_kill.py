"""kill -9 of any part at any instant: no acknowledged task is lost, none runs twice."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from functools import partial

import httpx
import pytest

from tests.e2e.cluster import MIB, Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Witness

TASKS = 200


def test_a_killed_agent_finds_its_container_again(cluster: Cluster, place: Place) -> None:
    with Witness() as witness:
        task_id = cluster.submit(place.image, f"{witness.say('start')}; echo before; sleep 4; echo after")
        eventually("it started", lambda: witness.count("start")[task_id])
        before = place.running(cluster)
        cluster.parts[-1].kill()
        cluster.agent()
        assert place.running(cluster) == before
        task = cluster.until(task_id, "completed")
    assert (task["attempt"], witness.count("start")[task_id]) == (1, 1)
    assert cluster.logs(task_id) == "before\nafter\n"


def test_what_ended_while_the_agent_was_dead_is_told_when_it_is_back(cluster: Cluster, place: Place) -> None:
    with Witness() as witness:
        task_id = cluster.submit(
            place.image, f"{witness.say('start')}; sleep 1; echo last; {witness.say('end')}; exit 7"
        )
        eventually("it started", lambda: witness.count("start")[task_id])
        cluster.parts[-1].kill()
        eventually("it ended", lambda: witness.count("end")[task_id])
        cluster.agent()
        task = cluster.until(task_id, "failed")
    assert (task["attempt"], task["exit_code"], task["reason"]) == (1, 7, "ExitCode")
    assert cluster.logs(task_id) == "last\n"


def test_a_server_that_is_gone_for_less_than_the_lease_disturbs_nothing(cluster: Cluster, place: Place) -> None:
    with Witness() as witness:
        task_id = cluster.submit(
            place.image, f"{witness.say('start')}; for i in 1 2 3 4 5 6; do echo $i; sleep 1; done"
        )
        eventually("it started", lambda: witness.count("start")[task_id])
        api, controller, _ = cluster.parts
        api.kill()
        controller.kill()
        time.sleep(2)  # the outage itself: longer than two heartbeats
        cluster.api("api-2")
        cluster.controller("controller-2")
        task = cluster.until(task_id, "completed")
    assert (task["attempt"], witness.count("start")[task_id]) == (1, 1)
    assert cluster.logs(task_id) == "1\n2\n3\n4\n5\n6\n"


def submit_until_acknowledged(cluster: Cluster, body: dict[str, object], patience: float = 60) -> str:
    """Submit as a careful client does: with a key, again until there is an answer."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}

    def acknowledged() -> str | None:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(f"{cluster.url}/api/tasks", json=body, headers=headers)
            if answer.status_code == 200:
                return str(answer.json()["task_id"])
            assert answer.status_code == 503, answer.text
        return None

    return eventually("a submit is acknowledged", acknowledged, patience)


@pytest.mark.timeout(400)
def test_every_acknowledged_task_ends_exactly_once_whatever_is_killed(make_cluster: MakeCluster, place: Place) -> None:
    chance = random.Random(1)
    cluster = make_cluster(place)
    parts = {"api": cluster.api(), "controller": cluster.controller()}
    cluster.agent()
    tasks: list[str] = []
    with Witness() as witness:
        body = {
            "user_id": "tester",
            "docker_image": place.image,
            "command": witness.say("ran"),
            "req_cpu": 0.5,
            "req_memory": 32 * MIB,
        }

        def submit() -> None:
            tasks.extend(submit_until_acknowledged(cluster, body) for _ in range(TASKS))

        submitter = threading.Thread(target=submit)
        submitter.start()
        kills = 0
        while submitter.is_alive() or kills < 6:
            name = chance.choice(["api", "controller"])
            time.sleep(chance.uniform(0.05, 1.5))  # the random instant
            parts[name].kill()
            kills += 1
            parts[name] = cluster.start(
                f"{name}-{kills}", *([name, "--port", str(cluster.port)] if name == "api" else [name])
            )
            if name == "api":
                eventually("the API answers", cluster.answers)
        submitter.join()
        finished = [eventually("ends", partial(done, cluster, task_id), 240) for task_id in tasks]
    assert len(set(tasks)) == TASKS
    bad = [(task["reason"], task["message"], task["exit_code"]) for task in finished if task["status"] != "completed"]
    assert bad == []
    assert witness.count("ran") == dict.fromkeys(tasks, 1)
    assert {task["attempt"] for task in finished} == {1}


def done(cluster: Cluster, task_id: str) -> dict[str, object] | None:
    with contextlib.suppress(httpx.TransportError):
        task = cluster.task(task_id)
        return task if task["finished_at"] else None
    return None
