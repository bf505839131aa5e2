"""Fixtures of the end-to-end tests: the same tests over Docker and over plain processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.places import Docker, Place, Processes


@pytest.fixture(scope="module")
def docker_place(docker_host: str, busybox: str) -> Docker:
    return Docker(docker_host, busybox)


@pytest.fixture(scope="module", params=["docker", "process"])
def place(request: pytest.FixtureRequest) -> Place:
    """Where the tasks run, with an independent eye on it."""
    if request.param == "docker":
        return request.getfixturevalue("docker_place")  # type: ignore[no-any-return]
    return Processes()


class MakeCluster(Protocol):
    def __call__(self, place: Place, **environment: str) -> Cluster: ...


@contextmanager
def opened(directory: Path, place: Place, environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster without parts; ended, with all it started, when the block ends."""
    cluster = Cluster(directory, place.runtime, place.environment | environment)
    try:
        yield cluster
    finally:
        cluster.close()
        place.clear(cluster)


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Make a cluster of the test's own, with settings of its own."""
    with ExitStack() as stack:
        yield lambda place, **environment: stack.enter_context(opened(tmp_path, place, environment))


@pytest.fixture(scope="module")
def cluster(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """API, controller and one agent, shared by the tests of a module that break nothing."""
    with opened(tmp_path_factory.mktemp("cluster"), place, {}) as cluster:
        cluster.start_all()
        yield cluster
