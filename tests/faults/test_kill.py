"""kill -9 of any part at any instant: no acknowledged task is lost, none runs twice."""

from __future__ import annotations

import contextlib
import os
import random
import uuid
from collections import Counter
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.e2e.cluster import MIB, Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Gate, Witness

TASKS = 200
SUBMITTERS = 16
KILLS = 4  # while tasks are submitted, and again while they run


def test_a_killed_agent_finds_its_container_again(cluster: Cluster, place: Place) -> None:
    with Witness() as witness, Gate() as gate:
        task_id = cluster.submit(place.image, f"{witness.say('start')}; echo before; {gate.wait}; echo after")
        cluster.until(task_id, "running")
        eventually("its log is there", lambda: cluster.logs(task_id) == "before\n")
        before = place.alive(cluster)
        assert [body.name for body in before] == [f"{task_id}-1"]
        cluster.parts[-1].kill()
        cluster.agent()
        assert place.alive(cluster) == before
        gate.open()
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
    with Witness() as witness, Gate() as gate, Gate() as later:
        command = f"{witness.say('start')}; echo before; {gate.wait}; echo meanwhile; {witness.say('on')}"
        task_id = cluster.submit(place.image, f"{command}; {later.wait}; echo after")
        eventually("it started", lambda: witness.count("start")[task_id])
        api, controller, agent = cluster.parts
        api.kill()
        controller.kill()
        eventually("the agent seeks the server in vain", lambda: agent.log.read_text().count("no connection to") >= 2)
        gate.open()
        eventually("the task goes on without a server", lambda: witness.count("on")[task_id])
        cluster.api("api-2")
        cluster.controller("controller-2")
        later.open()
        task = cluster.until(task_id, "completed")
    assert (task["attempt"], witness.count("start")[task_id]) == (1, 1)
    assert cluster.logs(task_id) == "before\nmeanwhile\nafter\n"


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
    """Where they can, tasks also note themselves in a file that all share. Containers cannot: CloudAI mounts nothing into
    them. The witness is no weaker: it hears of each start from the container itself, and outlives whatever is killed.
    """
    seed = int(os.environ.get("CLOUDAI_TEST_SEED") or random.randrange(2**32))
    print(f"CLOUDAI_TEST_SEED={seed} chooses the same parts and instants again")
    chance = random.Random(seed)
    cluster = make_cluster(place)
    parts = {"api": cluster.api(), "controller": cluster.controller()}
    cluster.agent()
    notes = cluster.directory / "ran"
    tasks: list[str] = []
    with Witness() as witness:
        note = f"echo $CLOUDAI_TASK_ID >>{notes}; " if place.runtime == "process" else ""
        body = {
            "user_id": "tester",
            "docker_image": place.image,
            "command": note + witness.say("ran"),
            "req_cpu": 0.5,
            "req_memory": 32 * MIB,
        }

        def submit(_: int) -> None:
            tasks.append(submit_until_acknowledged(cluster, body))

        def kill(name: str) -> None:
            parts[name].kill()
            flags = ["--port", str(cluster.port)] if name == "api" else []
            parts[name] = cluster.start(f"{name}-{len(cluster.parts)}", name, *flags)
            if name == "api":
                eventually("the API answers", cluster.answers)

        # Submits of several threads share a commit, and that is what a kill falls into.
        with ThreadPoolExecutor(SUBMITTERS) as submitters:
            submitted = [submitters.submit(submit, number) for number in range(TASKS)]
            for count in instants(chance):
                eventually("submits are acknowledged", partial(reached, tasks, count))
                kill(chance.choice(["api", "controller"]))
            for each in submitted:
                each.result()
        for count in instants(chance):
            eventually("tasks run", partial(reached, witness.sightings, count), 240)
            kill(chance.choice(["api", "controller"]))
        finished = [eventually("ends", partial(done, cluster, task_id), 240) for task_id in tasks]
    assert len(set(tasks)) == TASKS
    bad = [(task["reason"], task["message"], task["exit_code"]) for task in finished if task["status"] != "completed"]
    assert bad == []
    assert witness.count("ran") == dict.fromkeys(tasks, 1)
    if note:
        assert Counter(notes.read_text().split()) == dict.fromkeys(tasks, 1)
    assert {task["attempt"] for task in finished} == {1}


def instants(chance: random.Random) -> list[int]:
    """After how many of the tasks something is killed."""
    return sorted(chance.sample(range(TASKS), KILLS))


def reached(seen: Sized, count: int) -> bool:
    return len(seen) >= count


def done(cluster: Cluster, task_id: str) -> dict[str, object] | None:
    with contextlib.suppress(httpx.TransportError):
        task = cluster.task(task_id)
        return task if task["finished_at"] else None
    return None
