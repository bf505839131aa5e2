"""Namespaces of the cluster, with and without an operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.binaries import Missing, programs
from tests.engines import missing
from tests.kube.kube import Kube, Operating, Place


@pytest.fixture(scope="session")
def helm() -> Path:
    try:
        return programs("helm")["helm"]
    except Missing as lacking:
        missing("Helm", str(lacking))


@pytest.fixture
def place(kube: Kube) -> Iterator[Place]:
    """A new namespace without an operator."""
    with kube.namespace() as place:
        yield place


@pytest.fixture
def operator(place: Place) -> Iterator[Operating]:
    with place.operator() as operating:
        yield operating
