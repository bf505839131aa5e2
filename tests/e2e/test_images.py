"""Images on their way to a worker: how far they are, and why they do not come."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import ImageNotFound

from scripts.demo_image import root_of_busybox
from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import MakeCluster, opened
from tests.e2e.places import Docker
from tests.engines.proxy import Proxy
from tests.engines.registry import free_port, running_registry

pytestmark = pytest.mark.docker

MB = 1_000_000
CONTENT = 8 * MB


@pytest.fixture(scope="module")
def cluster(docker_place: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with opened(tmp_path_factory.mktemp("images"), docker_place, {}) as cluster:
        cluster.start_all()
        yield cluster


def large_busybox() -> bytes:
    """The root file system of busybox, with so much beside it that its way takes a while."""
    buffer = io.BytesIO(root_of_busybox())
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        content = tarfile.TarInfo("content")
        content.size = CONTENT
        archive.addfile(content, io.BytesIO(os.urandom(content.size)))  # fresh: no engine has seen it
    return buffer.getvalue()


@contextlib.contextmanager
def pushed(host: str, registry: str) -> Iterator[str]:
    """The name of a large image that the registry has and the engine has not."""
    repository = f"{registry}/large"
    with contextlib.closing(docker.DockerClient(base_url=host, timeout=60)) as client:
        client.api.import_image_from_data(large_busybox(), repository, "1", changes=["ENV PATH=/bin"])
        client.images.push(repository, "1")
        client.images.remove(f"{repository}:1")
        yield f"{repository}:1"
        with contextlib.suppress(ImageNotFound):
            client.images.remove(f"{repository}:1", force=True)


def test_a_task_says_how_far_the_pull_of_its_image_is(cluster: Cluster, docker_place: Docker, registry: str) -> None:
    with (
        Proxy(int(registry.rpartition(":")[2])) as network,
        pushed(docker_place.host, f"127.0.0.1:{network.port}") as image,
    ):

        def megabytes() -> list[int]:
            message = cluster.task(task_id)["message"] or ""
            found = re.fullmatch(rf"Pulling {image}: (\d+) of (\d+) MB in 1 layers", message)
            return [int(number) for number in found.groups()] if found else []

        def further() -> bool:
            """The engine tells nothing while nothing comes, so a little more comes with each look."""
            network.let_through(MB // 20)
            return megabytes()[0] > begun

        network.let_through(2 * MB)
        task_id = cluster.submit(image, "echo arrived")
        begun, whole = eventually("its size is told", megabytes)
        assert begun < CONTENT / MB <= whole
        eventually("it goes on", further)
        assert megabytes()[0] < whole
        assert cluster.task(task_id)["status"] == "pending"
        network.mend()
        task = cluster.until(task_id, "completed")
        assert cluster.logs(task_id) == "arrived\n"
    assert task["message"] == "The command ended with exit code 0."


def test_an_image_that_does_not_exist_says_so(cluster: Cluster, registry: str) -> None:
    task = cluster.until(cluster.submit(f"{registry}/nobody/nothing:1", "true"), "failed")
    assert task["reason"] == "ImageNotFound"
    assert f"The registry has no image {registry}/nobody/nothing:1" in task["message"]
    assert task["message"].endswith("check name and tag.")


def test_a_registry_that_is_not_there_says_so(cluster: Cluster) -> None:
    image = f"127.0.0.1:{free_port()}/some/image:1"
    task = cluster.until(cluster.submit(image, "true"), "failed")
    assert task["reason"] == "ImagePullFailed"
    assert task["message"].startswith(f"Pulling {image} failed (")
    assert "connection refused" in task["message"]
    assert task["message"].endswith("check the registry and the worker's network.")


def test_a_registry_that_shows_nothing_without_a_login_says_so(cluster: Cluster, tmp_path: Path) -> None:
    with running_registry(tmp_path, login=True) as address:
        task = cluster.until(cluster.submit(f"{address}/some/image:1", "true"), "failed")
    assert task["reason"] == "ImagePullFailed"
    assert task["message"].startswith(f"Pulling {address}/some/image:1 failed (")
    assert task["message"].endswith("log in on the worker with `docker login`.")


def test_a_pull_that_takes_too_long_says_so(make_cluster: MakeCluster, docker_place: Docker) -> None:
    cluster = make_cluster(docker_place, CLOUDAI_PULL_TIMEOUT_SECONDS="0.3")
    cluster.start_all()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a registry that never answers
        image = f"127.0.0.1:{silent.getsockname()[1]}/some/image:1"
        task = cluster.until(cluster.submit(image, "true"), "failed")
    assert task["reason"] == "ImagePullTimeout"
    assert task["message"] == (
        f"Pulling {image} took longer than 0.3 s; check the registry and the network, or raise the worker's pull timeout."
    )
