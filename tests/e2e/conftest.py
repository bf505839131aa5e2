"""Fixtures of the end-to-end tests: the same tests over Docker and over plain processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.places import Docker, Place, Processes


@pytest.fixture
def docker_place(request: pytest.FixtureRequest) -> Docker:
    return Docker(request.getfixturevalue("docker_host"), request.getfixturevalue("busybox"))


@pytest.fixture(params=["docker", "process"])
def place(request: pytest.FixtureRequest) -> Place:
    """Where the tasks run, with an independent eye on it."""
    if request.param == "docker":
        return request.getfixturevalue("docker_place")  # type: ignore[no-any-return]
    return Processes()


MakeCluster = Callable[[Place], Cluster]


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Make a cluster over a place; ended, with every container it made, when the test ends."""
    made: list[tuple[Cluster, Place]] = []

    def make(place: Place, **environment: str) -> Cluster:
        cluster = Cluster(tmp_path, place.runtime, place.environment | environment)
        made.append((cluster, place))
        return cluster

    yield make
    for cluster, place in made:
        cluster.close()
        place.clear(cluster)


@pytest.fixture
def cluster(make_cluster: MakeCluster, place: Place) -> Cluster:
    """API, controller and one agent, running."""
    cluster = make_cluster(place)
    cluster.api()
    cluster.controller()
    cluster.agent()
    return cluster
