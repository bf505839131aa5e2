"""Engines that tests of several parts share, started when the first of them asks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.cluster import cluster as clusters
from tests.cluster.__main__ import DIRECTORY as RUNNING
from tests.cluster.binaries import Missing, programs
from tests.cluster.images import load_busybox
from tests.engines import missing
from tests.engines.dockerd import PrivateDocker, answers
from tests.engines.images import build_busybox
from tests.engines.postgres import Postgres
from tests.engines.registry import running_registry
from tests.kube.kube import Kube, Place
from tests.store.worlds import World, new_name, on_kubernetes, on_sql

# How long an example takes says nothing of what it shows.
settings.register_profile("cloudai", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cloudai")

STORES = ("sqlite", "postgres", "kubernetes")


class Apart(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types for it
    """All tests that need the cluster in one process, all others in another: each engine is started, and cleared, by one."""

    def _split_scope(self, nodeid: str) -> str:
        return "kubernetes" if "/kube/" in nodeid or "kubernetes" in nodeid else "others"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Apart:
    return Apart(config, log)


@pytest.fixture(scope="session")
def docker_host() -> Iterator[str]:
    """DOCKER_HOST of an engine: the one that runs, else one of the tests' own."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if answers(host):
        yield host
        return
    with PrivateDocker() as engine:
        yield engine.host


@pytest.fixture(scope="session")
def busybox(docker_host: str) -> str:
    """The name of an image in that engine with the busybox commands in /bin and `sh` as its command."""
    return build_busybox(docker_host)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address, 127.0.0.1:PORT, of an empty registry that takes pushes."""
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server without databases."""
    with Postgres() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    if os.geteuid() != 0:
        missing("the right to mount a small file system", "run the tests as root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kube]:
    """The cluster that CLOUDAI_TEST_KUBECONFIG names, else the one of `make cluster`, else one of the tests' own."""
    named = os.environ.get("CLOUDAI_TEST_KUBECONFIG")
    try:
        if named:
            kubectl = shutil.which("kubectl")
            if kubectl is None:
                missing("kubectl", "install it, or unset CLOUDAI_TEST_KUBECONFIG")
            yield _prepared(Kube(Path(named), {**programs("helm"), "kubectl": Path(kubectl)}))
            return
        built = programs()
        running = clusters.saved(RUNNING)
        if running is not None and running.ready and running.alive():
            yield _prepared(Kube(running.kubeconfig, built, running))
            return
        own = clusters.start(tmp_path_factory.mktemp("cluster") / "files", built)
    except Missing as lacking:
        missing("A Kubernetes", str(lacking))
    try:
        load_busybox(own)
        yield _prepared(Kube(own.kubeconfig, built, own))
    finally:
        own.stop()


def _prepared(cluster: Kube) -> Kube:
    cluster.prepare()
    return cluster


@pytest.fixture(scope="module")
def shared(kube: Kube) -> Iterator[Place]:
    """A namespace with an operator, for the tests of a module that do not get into each other's way."""
    with kube.namespace() as place, place.operator():
        yield place


@pytest.fixture(params=STORES)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Each kind of store, new and empty."""
    if request.param == "kubernetes":
        kube: Kube = request.getfixturevalue("kube")
        with kube.namespace() as place:
            async with on_kubernetes(place, operated=False) as cluster:
                yield cluster
        return
    async with on_sql(_new_database(request, tmp_path)) as database:
        yield database


@pytest.fixture(params=STORES)
async def shared_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Each kind of store, where tasks are placed; on Kubernetes with the tasks of other tests of the module."""
    if request.param == "kubernetes":
        async with on_kubernetes(request.getfixturevalue("shared"), operated=True) as cluster:
            yield cluster
        return
    async with on_sql(_new_database(request, tmp_path)) as database:
        await database.begin()
        yield database


def _new_database(request: pytest.FixtureRequest, directory: Path) -> str:
    """The URL of an empty one."""
    if request.param == "sqlite":
        return f"sqlite:///{directory}/cloudai.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(new_name())
