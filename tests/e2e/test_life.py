"""One task's life, from the submit to the end that it deserves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import FINISHED, MIB, Cluster, eventually
from tests.e2e.conftest import MakeCluster, opened
from tests.e2e.places import Docker, Place, Processes
from tests.e2e.witness import Gate

# What a task says of itself while it runs, and when it has ended well.
RUNS = {
    "docker": "The container is running.",
    "process": "Runs as a plain process of the worker: the image is ignored.",
}
ENDED_WELL = RUNS | {"docker": "The command ended with exit code 0."}


@pytest.fixture(scope="module")
def docker_cluster(docker_place: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For what only containers do."""
    settings = {"CLOUDAI_STORAGE_CHECK_SECONDS": "0.2"}
    with opened(tmp_path_factory.mktemp("docker"), docker_place, settings) as cluster:
        cluster.start_all()
        yield cluster


def test_a_task_runs_and_its_truth_comes_back(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "echo out; echo err >&2; echo done")
    task = cluster.until(task_id, "completed")
    assert task["exit_code"] == 0
    assert task["worker_id"] == "worker-1"
    assert task["attempt"] == 1
    assert task["started_at"] is not None
    assert task["finished_at"] is not None
    assert (task["reason"], task["message"]) == (None, ENDED_WELL[place.runtime])
    assert sorted(cluster.logs(task_id).split()) == ["done", "err", "out"]
    eventually("nothing is left", lambda: not place.running(cluster))


def test_a_running_task_says_how_it_runs(cluster: Cluster, place: Place) -> None:
    with Gate() as gate:
        task_id = cluster.submit(place.image, gate.wait)
        task = cluster.until(task_id, "running")
        assert (task["reason"], task["message"]) == (None, RUNS[place.runtime])
    cluster.until(task_id, *FINISHED)


def test_a_command_that_fails_says_so(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, "exit 3"), "failed")
    assert (task["exit_code"], task["reason"]) == (3, "ExitCode")
    assert task["message"] == "The command ended with exit code 3; see its logs."


def test_a_list_runs_as_given(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, ["echo", "a  b", "$HOME"])
    cluster.until(task_id, "completed")
    assert cluster.logs(task_id) == "a  b $HOME\n"


def test_a_missing_command_says_so(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, ["no-such-command"]), "failed")
    assert task["reason"] == "CommandNotFound"
    assert (
        task["message"]
        == {
            "docker": "A command was not found (exit code 127); check its spelling and the image, and see the logs.",
            "process": "This worker has no program 'no-such-command'; it runs tasks as processes, without images. "
            "Correct the command or install the program.",
        }[place.runtime]
    )


def test_a_deadline_ends_the_task(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, "sleep 600", timeout_seconds=1), "failed")
    assert task["reason"] == "DeadlineExceeded"
    assert task["message"] == "It was stopped after timeout_seconds (1); raise it for longer work."
    eventually("nothing is left", lambda: not place.running(cluster))


def test_a_failed_task_is_tried_again_as_often_as_it_asks(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, "echo try; exit 1", max_retries=2), "failed")
    assert task["attempt"] == 3
    assert [cluster.logs(task["task_id"], attempt=attempt) for attempt in (1, 2, 3)] == ["try\n"] * 3


def test_logs_are_followed_while_they_are_written(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "for i in 1 2 3; do echo line $i; sleep 0.2; done")
    with cluster.http.stream("GET", f"/api/tasks/{task_id}/logs", params={"follow": "true"}) as answer:
        pieces = list(answer.iter_text())
    assert "".join(pieces) == "line 1\nline 2\nline 3\n"
    assert len(pieces) > 1


def test_a_large_log_arrives_whole(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "i=0; while [ $i -lt 20000 ]; do echo line number $i; i=$((i+1)); done")
    cluster.until(task_id, "completed")
    text = cluster.http.get(f"/api/tasks/{task_id}/logs").text
    assert text == "".join(f"line number {number}\n" for number in range(20000))


def test_a_task_larger_than_every_worker_waits_and_says_why(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "true", req_cpu=1000)
    small = cluster.submit(place.image, "true")
    cluster.until(small, "completed")
    task = cluster.task(task_id)
    assert (task["status"], task["reason"]) == ("queued", "TooLargeForEveryWorker")
    assert "CPU" in task["message"]


@pytest.mark.docker
def test_a_container_that_takes_too_much_memory_says_so(docker_cluster: Cluster, docker_place: Docker) -> None:
    # An engine watches the memory from a moment after the start on, and does not tell what was before.
    greedy = "sleep 1; x=a; while true; do x=$x$x$x$x; done"
    task = docker_cluster.until(docker_cluster.submit(docker_place.image, greedy, req_memory=16 * MIB), "failed")
    assert (task["reason"], task["exit_code"]) == ("OOMKilled", 137)
    assert task["message"] == "The container needed more than the 0.0156 GiB of memory it asked for; raise req_memory."


@pytest.mark.docker
def test_a_container_that_writes_too_much_says_so(docker_cluster: Cluster, docker_place: Docker) -> None:
    command = "dd if=/dev/zero of=/big bs=1M count=64; sleep 600"
    task = docker_cluster.until(docker_cluster.submit(docker_place.image, command, req_storage=16 * MIB), "failed")
    assert task["reason"] == "StorageLimitExceeded"
    assert task["message"] == "The container wrote more than the 0.0156 GiB it asked for; raise req_storage."
    eventually("nothing is left", lambda: not docker_place.running(docker_cluster))


@pytest.mark.docker
def test_a_container_that_cannot_start_says_so(docker_cluster: Cluster, docker_place: Docker) -> None:
    """The agent was told of a GPU, and the engine passes none on."""
    docker_cluster.agent("worker-gpu", "--cpu", "1", "--memory", "1", "--storage", "1", "--gpu", "1")
    task = docker_cluster.until(docker_cluster.submit(docker_place.image, "true", req_gpu=1), "failed")
    assert task["reason"] == "StartFailed"
    assert task["message"].endswith("; install the NVIDIA Container Toolkit there.")
    docker_cluster.parts.pop().stop()


@pytest.mark.docker
def test_a_container_that_somebody_removed_says_so(docker_cluster: Cluster, docker_place: Docker) -> None:
    task_id = docker_cluster.submit(docker_place.image, "echo here; sleep 600")
    eventually("its log is there", lambda: docker_cluster.logs(task_id) == "here\n")
    docker_cluster.until(task_id, "running")
    (container,) = docker_place.containers(docker_cluster)
    agent = docker_cluster.parts[-1]
    agent.pause()  # it shall look once the container is gone, not while it ends
    container.remove(force=True)
    agent.resume()
    task = docker_cluster.until(task_id, "failed")
    assert task["reason"] == "ContainerGone"
    assert task["message"] == (
        f"The container {task_id}-1 was removed by somebody other than CloudAI; submit the task again."
    )
    assert docker_cluster.logs(task_id) == "here\n"


def test_a_process_without_a_command_says_so(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(Processes())
    cluster.start_all()
    task = cluster.until(cluster.submit("busybox", None), "failed")
    assert task["reason"] == "StartFailed"
    assert task["message"] == (
        "This worker runs tasks as processes, without images, so the task needs a command; give it one, or run the worker "
        "where Docker is."
    )


def test_gpus_are_packed_by_device_and_never_twice(make_cluster: MakeCluster) -> None:
    place = Processes()
    cluster = make_cluster(place)
    cluster.api()
    cluster.controller()
    cluster.agent("worker-1", "--cpu", "4", "--memory", "2", "--storage", "10", "--gpu", "1")
    first = cluster.submit(place.image, "sleep 600", req_gpu=0.5)
    second = cluster.submit(place.image, "sleep 600", req_gpu=0.5)
    third = cluster.submit(place.image, "true", req_gpu=0.5)
    cluster.until(first, "running")
    cluster.until(second, "running")
    assert cluster.task(third)["reason"] == "WaitingForCapacity"
    assert cluster.worker("worker-1")["available_gpu"] == 0
    cluster.cancel(first)
    cluster.until(third, "completed")
