"""Fetching images, from a real registry and from one that never answers."""

from __future__ import annotations

import io
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress

import docker
import pytest
from docker.errors import ImageNotFound

from cloudai_agent.docker_images import refusal
from cloudai_agent.runtime import RunRefused, Runtime
from tests.agent.conftest import MIB, Bench
from tests.engines.proxy import Proxy
from tests.engines.registry import free_port

pytestmark = pytest.mark.docker


@pytest.fixture
def runtime(on_docker: Bench) -> Runtime:
    return on_docker.open()


@pytest.fixture
def pushed(on_docker: Bench, engine: docker.DockerClient, registry: str) -> Iterator[str]:
    """The name of an image that the registry has and the engine has not."""
    name = f"{registry}/pushed:1"
    engine.api.import_image_from_data(layer(), f"{registry}/pushed", "1")
    engine.images.push(f"{registry}/pushed", "1")
    engine.images.remove(name)
    yield name
    with suppress(ImageNotFound):
        engine.images.remove(name)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a registry that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def layer() -> bytes:
    """A root file system that no engine has seen before."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        content = tarfile.TarInfo("content")
        content.size = 3 * MIB
        archive.addfile(content, io.BytesIO(os.urandom(content.size)))
    return buffer.getvalue()


def fetch(runtime: Runtime, image: str) -> list[str]:
    """What was told of the progress."""
    told: list[str] = []
    runtime.pull(image, told.append, lambda: False)
    return told


def test_an_image_is_fetched_and_its_progress_told(runtime: Runtime, pushed: str) -> None:
    assert not runtime.has_image(pushed)
    told = fetch(runtime, pushed)
    assert runtime.has_image(pushed)
    assert told
    assert all(text.startswith(f"Pulling {pushed}: ") for text in told)


def test_how_far_it_is_is_told_again_while_nothing_comes(runtime: Runtime, pushed: str, registry: str) -> None:
    told: list[str] = []
    host, _, port = registry.rpartition(":")
    with Proxy(int(port)) as network:
        network.let_through(2 * MIB)
        image = pushed.replace(registry, f"{host}:{network.port}")
        runtime.pull(image, told.append, lambda: len(told) > 1 and told[-1] == told[-2])
        assert not runtime.has_image(image)
    assert told[-1] == told[-2]


def test_an_image_of_a_digest_is_fetched(runtime: Runtime, pushed: str, engine: docker.DockerClient) -> None:
    fetch(runtime, pushed)
    (digest,) = engine.images.get(pushed).attrs["RepoDigests"]
    engine.images.remove(pushed)
    engine.images.prune()
    fetch(runtime, digest)
    assert runtime.has_image(digest)
    engine.images.remove(digest, force=True)


def test_the_policy_always_fetches_what_is_there(on_docker: Bench) -> None:
    assert not on_docker.open(pull_policy="always").has_image(on_docker.image)


def test_the_policy_never_refuses_what_is_not_there(on_docker: Bench, pushed: str) -> None:
    with pytest.raises(RunRefused, match="pull policy") as refused:
        on_docker.open(pull_policy="never").has_image(pushed)
    assert refused.value.reason == "ImageNotFound"


def test_what_is_no_name_of_an_image_is_told(runtime: Runtime) -> None:
    with pytest.raises(RunRefused) as refused:
        runtime.has_image("No Such Name")
    assert refused.value.reason == "InvalidImageName"


@pytest.mark.parametrize("name", ["pushed:nosuchtag", "nosuchimage:1"])
def test_what_the_registry_does_not_have_is_told(runtime: Runtime, pushed: str, registry: str, name: str) -> None:
    with pytest.raises(RunRefused) as refused:
        fetch(runtime, f"{registry}/{name}")
    assert refused.value.reason == "ImageNotFound"


def test_a_registry_that_is_not_there_is_told(runtime: Runtime) -> None:
    with pytest.raises(RunRefused, match="connection refused") as refused:
        fetch(runtime, f"127.0.0.1:{free_port()}/image:1")
    assert refused.value.reason == "ImagePullFailed"


def test_a_silent_registry_is_waited_for_until_the_timeout(on_docker: Bench, silent: str) -> None:
    with pytest.raises(RunRefused, match="took longer than") as refused:
        fetch(on_docker.open(pull_timeout_seconds=0.3), f"{silent}/image:1")
    assert refused.value.reason == "ImagePullTimeout"


def test_a_pull_is_given_up_while_the_registry_is_silent(runtime: Runtime, silent: str) -> None:
    wanted, fetching = threading.Event(), threading.Event()

    def cancelled() -> bool:
        fetching.set()
        return not wanted.is_set()

    wanted.set()
    pull = threading.Thread(target=runtime.pull, args=(f"{silent}/image:1", lambda _: None, cancelled))
    pull.start()
    assert fetching.wait(30)
    wanted.clear()
    pull.join(30)
    assert not pull.is_alive()


@pytest.mark.parametrize(
    ("words", "missing", "reason", "advice"),
    [
        ("pull access denied for x, repository does not exist or may require", True, "ImageNotFound", "docker login"),
        ("manifest unknown: manifest unknown", False, "ImageNotFound", "check name and tag"),
        ("unauthorized: authentication required", False, "ImagePullFailed", "docker login"),
        ("toomanyrequests: You have reached your pull rate limit", False, "ImagePullFailed", "check the registry"),
        ("invalid reference format", False, "InvalidImageName", "correct it"),
    ],
)
def test_a_registrys_words_have_a_reason_and_an_advice(words: str, missing: bool, reason: str, advice: str) -> None:
    refused = refusal("x", words, missing=missing)
    assert refused.reason == reason
    assert advice in refused.message
