"""Containers of a real engine: what they are made of, whose they are, and why they do not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import docker
import pytest
from docker.models.containers import Container as EngineContainer

from cloudai.resources import GIB, GpuShare, Resources, Run
from cloudai_agent.docker_config import ATTEMPT, TASK, container_of, start_refusal
from cloudai_agent.runtime import ContainerState, RunRefused, Runtime
from tests.agent.conftest import MIB, Bench, finished, found, started

pytestmark = pytest.mark.docker


@pytest.fixture
def runtime(on_docker: Bench) -> Runtime:
    return on_docker.open()


@pytest.fixture
def foreign(engine: docker.DockerClient, on_docker: Bench) -> Iterator[EngineContainer]:
    """A container of somebody else, with the name of a run."""
    name = on_docker.run("true").run_id
    container = engine.containers.run(on_docker.image, "sleep 1000", name=name, network_mode="none", detach=True)
    yield container
    container.remove(force=True)


def described(engine: docker.DockerClient, run: Run) -> dict[str, Any]:
    return dict(engine.api.inspect_container(run.run_id)["HostConfig"])


def refusal(runtime: Runtime, run: Run) -> RunRefused:
    """Why a run is not created or does not start."""
    with pytest.raises(RunRefused) as refused:
        started(runtime, run)
    return refused.value


@pytest.mark.parametrize("network", ["none", "host"])
def test_a_container_is_called_like_its_run(on_docker: Bench, network: str) -> None:
    run = on_docker.run("hostname")
    _, text = finished(on_docker.open(network=network), run)
    assert text.decode() == f"{run.run_id}\n"


def test_requests_are_limits(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    run = on_docker.run("true", cpu=250, memory=100 * MIB)
    runtime.create(run)
    host = described(engine, run)
    assert host["NanoCpus"] == 250_000_000
    assert host["Memory"] == host["MemorySwap"] == 100 * MIB
    assert host["PidsLimit"] == on_docker.settings.pids_limit
    assert host["Init"] is True


def test_a_container_gains_no_privileges(on_docker: Bench, engine: docker.DockerClient) -> None:
    run = on_docker.run("true")
    on_docker.open(cap_drop="NET_RAW, MKNOD").create(run)
    host = described(engine, run)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["CapDrop"] == ["NET_RAW", "MKNOD"]
    assert host["Privileged"] is False


def test_by_default_a_container_lacks_what_it_hardly_ever_needs(on_docker: Bench, engine: docker.DockerClient) -> None:
    """As the agent of an operator who set nothing makes it; what is asserted is what docs/security.md promises."""
    run = on_docker.run("grep -e ^CapBnd -e ^NoNewPrivs /proc/self/status")
    runtime = on_docker.open()
    end, text = finished(runtime, run)
    host = described(engine, run)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["CapDrop"] == ["NET_RAW", "MKNOD", "AUDIT_WRITE", "SETFCAP", "NET_BIND_SERVICE", "SYS_CHROOT"]
    assert (host["CapAdd"], host["Privileged"], host["Binds"]) == (None, False, None)
    assert end.exit_code == 0
    held = dict(line.split(":\t") for line in text.decode().splitlines())
    assert held["NoNewPrivs"] == "1"
    kept = {bit for bit in range(64) if int(held["CapBnd"], 16) >> bit & 1}
    assert kept == {0, 1, 3, 4, 5, 6, 7, 8}  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP


def test_amounts_below_what_the_engine_takes_are_raised(on_docker: Bench, runtime: Runtime) -> None:
    end, _ = finished(runtime, on_docker.run("true", cpu=1, memory=1))
    assert end.exit_code == 0


def test_more_cores_than_the_machine_has_are_no_limit(on_docker: Bench, runtime: Runtime) -> None:
    end, _ = finished(runtime, on_docker.run("true", cpu=1_000_000))
    assert end.exit_code == 0


def test_a_container_has_exactly_its_gpus(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    run = replace(on_docker.run("true"), gpus=(GpuShare(1, 1000), GpuShare(3, 500)))
    runtime.create(run)
    (request,) = described(engine, run)["DeviceRequests"]
    assert request["DeviceIDs"] == ["1", "3"]
    assert "NVIDIA_VISIBLE_DEVICES=1,3" in engine.api.inspect_container(run.run_id)["Config"]["Env"]


def test_gpus_without_a_driver_are_refused_with_what_to_do(on_docker: Bench, runtime: Runtime) -> None:
    run = replace(on_docker.run("true"), gpus=(GpuShare(0, 1000),))
    refused = refusal(runtime, run)
    assert refused.reason == "StartFailed"
    assert "NVIDIA Container Toolkit" in refused.message
    # An agent that starts now sees that it cannot be started.
    assert found(on_docker.open(), run.run_id).state is ContainerState.CREATED
    again = found(on_docker.open(), run.run_id).refusal
    assert again is not None
    assert (again.reason, again.message) == (refused.reason, refused.message)


def test_too_much_memory_is_told(on_docker: Bench, runtime: Runtime) -> None:
    # An engine watches the memory from a moment after the start on, and does not tell what was before.
    command = "sleep 1; dd if=/dev/zero of=/dev/null bs=200M count=1"
    end, _ = finished(runtime, on_docker.run(command, memory=16 * MIB))
    assert end.oom_killed
    assert end.exit_code == 137


def test_a_missing_command_ends_with_127(on_docker: Bench, runtime: Runtime) -> None:
    end, log = finished(runtime, on_docker.run(("nosuchprogram", "x")))
    assert end.exit_code == 127
    assert b"nosuchprogram" in log


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ('exec: "x": executable file not found in $PATH: unknown', "CommandNotFound"),
        ('exec: "/x": stat /x: no such file or directory: unknown', "CommandNotFound"),
        ('exec: "/etc/passwd": permission denied: unknown', "StartFailed"),
        ("failed to create shim task: opening w/o fifo: context deadline exceeded: unknown", "WorkerLost"),
        ("task 28d3d8: already exists: unknown", "StartFailed"),
    ],
)
def test_the_engines_words_about_a_start_have_a_reason_now_and_when_they_are_read_again(
    words: str, reason: str
) -> None:
    assert start_refusal(words).reason == reason
    never = "0001-01-01T00:00:00Z"
    state = {"Status": "created", "StartedAt": never, "FinishedAt": never, "ExitCode": 128, "OOMKilled": False}
    labels = {TASK: "task-1", ATTEMPT: "1"}
    made = {"Name": "/task-1-1", "Config": {"Labels": labels}, "State": {**state, "Error": words}}
    assert container_of(made).refusal == start_refusal(words)


def test_without_a_command_the_images_own_runs(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    with image_with(engine, on_docker.image, 'CMD ["echo", "own"]') as image:
        _, log = finished(runtime, replace(on_docker.run(None), image=image))
    assert log == b"own\n"


def test_a_list_replaces_the_entrypoint(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    with image_with(engine, on_docker.image, 'ENTRYPOINT ["echo", "entry"]') as image:
        assert finished(runtime, replace(on_docker.run(("echo", "mine")), image=image))[1] == b"mine\n"
        assert finished(runtime, replace(on_docker.run("echo $0 ours"), image=image))[1].endswith(b" ours\n")


def test_an_image_without_a_command_is_refused(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    engine.api.import_image_from_data(b"\0" * 10240, "cloudai-test-empty", "1")
    refused = refusal(runtime, replace(on_docker.run(None), image="cloudai-test-empty:1"))
    engine.images.remove("cloudai-test-empty:1")
    assert refused.reason == "StartFailed"
    assert "give the task a command" in refused.message


def test_an_unknown_network_is_refused(on_docker: Bench) -> None:
    refused = refusal(on_docker.open(network="nosuchnet"), on_docker.run("true"))
    assert refused.reason == "StartFailed"
    assert "nosuchnet" in refused.message


def test_a_foreign_container_of_the_same_name_is_left_alone(
    on_docker: Bench, runtime: Runtime, foreign: EngineContainer
) -> None:
    name = foreign.name
    assert name is not None
    run = replace(on_docker.run("true"), task_id=name.removesuffix("-1"))
    refused = refusal(runtime, run)
    assert refused.reason == "StartFailed"
    assert run.run_id in refused.message
    runtime.stop(run.run_id, 0)
    runtime.remove(run.run_id)
    assert runtime.container(run.run_id) is None
    assert list(runtime.read_log(run.run_id, 0)) == []
    assert runtime.containers() == []
    foreign.reload()
    assert foreign.status == "running"


def test_one_cluster_does_not_see_the_containers_of_another(on_docker: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_docker.run("exec sleep 1000"))
    other = on_docker.open()
    other.bind("other-cluster", "worker-1")
    assert other.containers() == []
    other.stop(run_id, 0)
    other.remove(run_id)
    assert found(runtime, run_id).state is ContainerState.RUNNING


def test_removing_takes_the_volumes_too(on_docker: Bench, runtime: Runtime, engine: docker.DockerClient) -> None:
    with image_with(engine, on_docker.image, "VOLUME /scratch") as image:
        run = replace(on_docker.run("true"), image=image)
        finished(runtime, run)
        (mount,) = engine.api.inspect_container(run.run_id)["Mounts"]
        runtime.remove(run.run_id)
    assert mount["Name"] not in {volume.name for volume in engine.volumes.list()}


def test_the_capacity_is_the_engines_machine(runtime: Runtime, engine: docker.DockerClient) -> None:
    info = engine.info()
    capacity = runtime.capacity()
    assert capacity == Resources(1000 * info["NCPU"], info["MemTotal"], capacity.storage, 0)
    assert capacity.storage > GIB // 1024


@contextlib.contextmanager
def image_with(engine: docker.DockerClient, base: str, change: str) -> Iterator[str]:
    """An image like `base` with one more line of a Dockerfile."""
    name = "cloudai-test-changed"
    container = engine.containers.create(base, "true", network_mode="none")
    try:
        container.commit(name, "1", changes=change)
    finally:
        container.remove()
    yield f"{name}:1"
    engine.images.remove(f"{name}:1", force=True)
