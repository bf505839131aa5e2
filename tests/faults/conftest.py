"""The fault tests start the same clusters as the end-to-end tests, one each: they break them."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.conftest import MakeCluster, docker_place, make_cluster, place
from tests.e2e.places import Place

__all__ = ["cluster", "docker_place", "make_cluster", "place"]


@pytest.fixture
def cluster(make_cluster: MakeCluster, place: Place) -> Cluster:
    """API, controller and one agent, running."""
    cluster = make_cluster(place)
    cluster.start_all()
    return cluster
