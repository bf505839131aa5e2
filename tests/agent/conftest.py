"""Runtimes to test: a real engine's containers and real processes, and runs to give them."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest

from cloudai.resources import Resources, Run
from cloudai.settings import Settings
from cloudai_agent.docker import DockerRuntime
from cloudai_agent.process import ProcessRuntime
from cloudai_agent.runtime import Container, ContainerState, Runtime

MIB = 1024 * 1024
PATIENCE = 60.0  # seconds; whatever takes longer counts as never

_numbers = itertools.count(time.time_ns())


def eventually(what: str, probe: Callable[[], bool]) -> None:
    """Look until `probe` is true; an AssertionError that names `what` when it never is."""
    deadline = time.monotonic() + PATIENCE
    while not probe():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


@dataclass
class Bench:
    """One kind of runtime on a test's own data directory; `open` makes agents' runtimes, which are all closed at the end."""

    make: Callable[[Settings], Runtime]
    settings: Settings
    image: str
    cluster: str
    opened: list[Runtime] = field(default_factory=list)

    def open(self, worker: str = "worker-1", **changes: object) -> Runtime:
        """A runtime as a newly started agent has it."""
        runtime = self.make(self.settings.model_copy(update=changes))
        runtime.bind(self.cluster, worker)
        self.opened.append(runtime)
        return runtime

    def run(self, command: str | tuple[str, ...] | None, **amounts: int) -> Run:
        """A run with a name of its own; amounts as Resources has them."""
        resources = Resources(**{"cpu": 500, "memory": 64 * MIB, "storage": 0, "gpu": 0, **amounts})
        return Run(
            task_id=f"task-{next(_numbers)}",
            attempt=1,
            worker_id="worker-1",
            user_id="u",
            image=self.image,
            command=command,
            resources=resources,
        )

    def close(self) -> None:
        for runtime in self.opened:
            for container in runtime.containers():
                runtime.stop(container.run_id, 0)
                runtime.remove(container.run_id)
            runtime.close()


def started(runtime: Runtime, run: Run) -> str:
    """Create and start; the run's id."""
    runtime.create(run)
    runtime.start(run.run_id)
    return run.run_id


def finished(runtime: Runtime, run: Run) -> tuple[Container, bytes]:
    """Run it to its end: the container as it ended, and its whole log."""
    run_id = started(runtime, run)
    text = b"".join(runtime.read_log(run_id, 0))
    return ended(runtime, run_id), text


def ended(runtime: Runtime, run_id: str) -> Container:
    """Wait for its end."""
    eventually(f"{run_id} ends", lambda: found(runtime, run_id).state is ContainerState.EXITED)
    return found(runtime, run_id)


def found(runtime: Runtime, run_id: str) -> Container:
    container = runtime.container(run_id)
    assert container is not None
    return container


@contextlib.contextmanager
def bench_of(kind: str, directory: Path, image: str) -> Iterator[Bench]:
    """DOCKER_HOST is set already where the kind is docker."""
    settings = Settings(data_dir=directory, network="none")
    make: Callable[[Settings], Runtime] = DockerRuntime if kind == "docker" else ProcessRuntime
    bench = Bench(make, settings, image, cluster=f"test-{os.getpid()}-{next(_numbers)}")
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def on_docker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("docker_host"))
    with bench_of("docker", tmp_path, request.getfixturevalue("busybox")) as bench:
        yield bench


@pytest.fixture
def on_processes(tmp_path: Path) -> Iterator[Bench]:
    with bench_of("process", tmp_path, "ignored") as bench:
        yield bench


@pytest.fixture(params=[pytest.param("on_docker", marks=pytest.mark.docker), "on_processes"])
def bench(request: pytest.FixtureRequest) -> Bench:
    value = request.getfixturevalue(request.param)
    assert isinstance(value, Bench)
    return value


@pytest.fixture
def runtime(bench: Bench) -> Runtime:
    return bench.open()


@pytest.fixture
def engine(on_docker: Bench) -> Iterator[docker.DockerClient]:
    """The engine seen without CloudAI."""
    with contextlib.closing(docker.DockerClient.from_env(timeout=60)) as client:
        yield client
