"""What `make demo` runs: a person's first look at CloudAI, with an engine and without."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import psutil
import pytest
from docker.errors import ImageNotFound

PATIENCE = 110


def shown(temporary: Path, docker_host: str) -> str:
    """What the demo shows; it must end well. All that it makes and starts is, or is named after, something in `temporary`."""
    temporary.mkdir()
    environment = os.environ | {"DOCKER_HOST": docker_host, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "scripts.demo"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done
    return done.stdout


def left(temporary: Path) -> list[str]:
    """Files and processes that the demo left behind."""
    found = [str(path) for path in temporary.iterdir()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = [*process.cmdline(), *process.environ().values(), process.cwd()]
            if process.pid != os.getpid() and any(word.startswith(str(temporary)) for word in words):
                found.append(" ".join(process.cmdline()))
    return found


def check_story(text: str) -> None:
    for line in ("hello from ", "this one fails", "step 1", "step 3", "TooLargeForEveryWorker", "All as it should be"):
        assert line in text


def test_without_an_engine_the_demo_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    text = shown(tmp_path / "tmp", f"unix://{tmp_path}/none.sock")
    assert "No Docker engine answers, so tasks run as plain processes" in text
    assert "runtime process: asked for" in text
    check_story(text)
    assert left(tmp_path / "tmp") == []


@pytest.mark.docker
def test_with_an_engine_the_demo_runs_containers_and_leaves_nothing(
    tmp_path: Path, docker_host: str, busybox: str
) -> None:
    with contextlib.closing(docker.DockerClient(base_url=docker_host, timeout=60)) as client, named(client, busybox):
        before = every(client)
        text = shown(tmp_path / "tmp", docker_host)
        assert every(client) == before
    assert "Docker answers and has a busybox image" in text
    assert "runtime docker: the Docker engine answers" in text
    check_story(text)
    assert left(tmp_path / "tmp") == []


@contextlib.contextmanager
def named(client: docker.DockerClient, image: str) -> Iterator[None]:
    """Within the block there is an image called busybox, so that the demo asks no registry on the internet."""
    try:
        client.images.get("busybox:latest")
        made = False
    except ImageNotFound:
        made = client.images.get(image).tag("busybox", "latest")
    try:
        yield
    finally:
        if made:
            client.images.remove("busybox:latest")


def every(client: docker.DockerClient) -> tuple[set[str | None], set[str | None]]:
    """All containers, ended ones too, and all images of an engine."""
    containers = client.containers.list(all=True, ignore_removed=True)
    return {each.id for each in containers}, {each.id for each in client.images.list()}
