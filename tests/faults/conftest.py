"""The fault tests start the same clusters as the end-to-end tests."""

from tests.e2e.conftest import cluster, docker_place, make_cluster, place

__all__ = ["cluster", "docker_place", "make_cluster", "place"]
