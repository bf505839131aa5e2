"""One cluster for all tests here: the one that CLOUDAI_TEST_KUBECONFIG names, else one of the tests' own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cluster as clusters
from tests.cluster.binaries import Missing, programs
from tests.cluster.images import load_busybox
from tests.engines import missing
from tests.kube.kube import ROOT, Kube, Operating, Place


@pytest.fixture(scope="session")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kube]:
    named = os.environ.get("CLOUDAI_TEST_KUBECONFIG")
    if named:
        found = {name: Path(path) for name in ("kubectl", "helm") if (path := shutil.which(name))}
        cluster = Kube(Path(named), found)
        prepare(cluster)
        yield cluster
        return
    try:
        built = programs()
        own = clusters.start(tmp_path_factory.mktemp("cluster") / "files", built)
    except Missing as lacking:
        missing("A Kubernetes", str(lacking))
    try:
        load_busybox(own)
        cluster = Kube(own.kubeconfig, built)
        prepare(cluster)
        yield cluster
    finally:
        own.stop()


def prepare(cluster: Kube) -> None:
    cluster.kubectl("apply", "-f", str(ROOT / "manifests" / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/tasks.cloudai.dev", "--timeout=60s")


@pytest.fixture
def place(kube: Kube) -> Iterator[Place]:
    """A new namespace without an operator."""
    with kube.namespace() as place:
        yield place


@pytest.fixture(scope="module")
def shared(kube: Kube) -> Iterator[Place]:
    """A namespace with an operator, for the tests of a module that do not get into each other's way."""
    with kube.namespace() as place, place.operator():
        yield place


@pytest.fixture
def operator(place: Place) -> Iterator[Operating]:
    with place.operator() as operating:
        yield operating
