"""Fetching images from a registry that asks who it is, with the logins that Docker's own configuration holds."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from cloudai_agent.runtime import RunRefused, Runtime
from tests.agent.conftest import Bench
from tests.engines.registry import PASSWORD, USER, running_registry

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("private"), login=True) as address:
        yield address


@pytest.fixture
def image(on_docker: Bench, engine: docker.DockerClient, private: str) -> str:
    """An image that only the private registry has."""
    name = f"{private}/image:1"
    engine.images.get(on_docker.image).tag(name)
    engine.api.push(name, auth_config={"username": USER, "password": PASSWORD})
    engine.images.remove(name)
    return name


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's own configuration, still without a login."""
    directory = tmp_path / "docker"
    directory.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(directory))
    return directory / "config.json"


@pytest.fixture
def runtime(on_docker: Bench, configuration: Path) -> Runtime:
    runtime = on_docker.open()
    runtime.ping()
    return runtime


def log_in(configuration: Path, *logins: tuple[str, str]) -> None:
    """As `docker login` does, for (registry, password)."""
    auths = {
        registry: {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()} for registry, password in logins
    }
    configuration.write_text(json.dumps({"auths": auths}))


def fetch(runtime: Runtime, image: str) -> None:
    runtime.pull(image, lambda _: None, lambda: False)


@pytest.mark.parametrize("password", [None, "wrong"])
def test_without_the_right_login_the_advice_is_to_log_in(
    runtime: Runtime, image: str, private: str, configuration: Path, password: str | None
) -> None:
    if password:
        log_in(configuration, (private, password))
    with pytest.raises(RunRefused, match="docker login") as refused:
        fetch(runtime, image)
    assert refused.value.reason == "ImagePullFailed"


def test_a_login_after_the_agent_started_counts(
    runtime: Runtime, image: str, private: str, configuration: Path, engine: docker.DockerClient
) -> None:
    log_in(configuration, ("elsewhere.example", PASSWORD))
    with pytest.raises(RunRefused):
        fetch(runtime, image)
    log_in(configuration, ("elsewhere.example", PASSWORD), (private, PASSWORD))
    fetch(runtime, image)
    assert runtime.has_image(image)
    engine.images.remove(image)


@pytest.mark.filterwarnings("ignore:docker-credential-not-installed")
@pytest.mark.parametrize("content", ["{", '{"credsStore": "not-installed"}'])
def test_a_configuration_that_gives_no_login_is_no_reason_to_fail(
    runtime: Runtime, image: str, configuration: Path, content: str
) -> None:
    configuration.write_text(content)
    with pytest.raises(RunRefused) as refused:
        fetch(runtime, image)
    assert refused.value.reason == "ImagePullFailed"
