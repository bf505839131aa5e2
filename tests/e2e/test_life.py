"""One task's life, from the submit to the end that it deserves."""

from __future__ import annotations

from tests.e2e.cluster import MIB, Cluster, eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker, Place, Processes


def test_a_task_runs_and_its_truth_comes_back(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, "echo out; echo err >&2; echo done")
    task = cluster.until(task_id, "completed")
    assert task["exit_code"] == 0
    assert task["worker_id"] == "worker-1"
    assert task["attempt"] == 1
    assert task["started_at"] is not None
    assert task["finished_at"] is not None
    assert sorted(cluster.logs(task_id).split()) == ["done", "err", "out"]
    eventually("nothing is left", lambda: not place.running(cluster))


def test_a_command_that_fails_says_so(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, "exit 3"), "failed")
    assert (task["exit_code"], task["reason"]) == (3, "ExitCode")


def test_a_list_runs_as_given(cluster: Cluster, place: Place) -> None:
    task_id = cluster.submit(place.image, ["echo", "a  b", "$HOME"])
    cluster.until(task_id, "completed")
    assert cluster.logs(task_id) == "a  b $HOME\n"


def test_a_missing_command_says_so(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, ["no-such-command"]), "failed")
    assert task["reason"] == "CommandNotFound"


def test_a_deadline_ends_the_task(cluster: Cluster, place: Place) -> None:
    task = cluster.until(cluster.submit(place.image, "sleep 600", timeout_seconds=1), "failed")
    assert task["reason"] == "DeadlineExceeded"
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


def test_an_image_that_does_not_exist_says_so(make_cluster: MakeCluster, docker_place: Docker, registry: str) -> None:
    cluster = make_cluster(docker_place)
    cluster.start_all()
    task = cluster.until(cluster.submit(f"{registry}/nobody/nothing:1", "true"), "failed")
    assert task["reason"] == "ImageNotFound"


def test_a_container_that_takes_too_much_memory_says_so(make_cluster: MakeCluster, docker_place: Docker) -> None:
    cluster = make_cluster(docker_place)
    cluster.start_all()
    greedy = "x=a; while true; do x=$x$x$x$x; done"
    task = cluster.until(cluster.submit(docker_place.image, greedy, req_memory=16 * MIB), "failed")
    assert task["reason"] == "OOMKilled"


def test_a_container_that_writes_too_much_says_so(make_cluster: MakeCluster, docker_place: Docker) -> None:
    cluster = make_cluster(docker_place, CLOUDAI_STORAGE_CHECK_SECONDS="0.2")
    cluster.start_all()
    command = "dd if=/dev/zero of=/big bs=1M count=64; sleep 600"
    task = cluster.until(cluster.submit(docker_place.image, command, req_storage=16 * MIB), "failed")
    assert task["reason"] == "StorageLimitExceeded"
    eventually("nothing is left", lambda: not docker_place.running(cluster))


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
