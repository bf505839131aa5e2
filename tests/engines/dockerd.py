"""A Docker Engine of the tests' own: it shares nothing with another engine of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import docker
import psutil
import requests
from docker.errors import DockerException

from tests.engines import dies_with_us, missing

START_SECONDS = 60.0
HOW = "run scripts/provision as root, or start a Docker Engine and set DOCKER_HOST"


class PrivateDocker:
    """A context that holds a running engine. `host` is its DOCKER_HOST; containers need the network `host` or `none`."""

    def __init__(self, *, live_restore: bool = False) -> None:
        """With `live_restore` containers go on while the engine is stopped."""
        if os.geteuid() != 0 or shutil.which("dockerd") is None:
            missing("A Docker Engine", HOW)
        self.directory = Path(tempfile.mkdtemp(prefix="dockerd-", dir="/tmp"))  # short: a socket's path has a limit
        self.host = f"unix://{self.directory}/docker.sock"
        self._live_restore = live_restore
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateDocker:
        try:
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._clean()

    def start(self) -> None:
        """Returns once it answers."""
        place = self.directory
        arguments = [
            *dies_with_us("TERM"),
            "dockerd",
            "--data-root",
            f"{place}/data",
            "--exec-root",
            f"{place}/exec",
            "-H",
            self.host,
        ]
        arguments += ["--pidfile", f"{place}/pid", "--bridge=none", "--iptables=false", "--ip6tables=false"]
        arguments += ["--storage-driver=overlay2", "--insecure-registry=127.0.0.0/8", "--shutdown-timeout=2"]
        arguments += ["--live-restore"] if self._live_restore else []
        with (place / "log").open("ab") as output:
            self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.host):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"dockerd did not start:\n{(place / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """As an operator does; it ends its containers, but for `live_restore`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)
        # Its containerd dies with it. Where nobody reaps the dead, the next engine would take it for alive.
        (self.directory / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def pause(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def shims(self) -> int:
        """How many containers it has or is about to have."""
        return sum("containerd-shim" in " ".join(command) for _, command in self._processes())

    def _processes(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        """Those that name its directory, and their commands."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if any(str(self.directory) in word for word in command):
                    yield process, command

    @property
    def running(self) -> bool:
        return self._process is not None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def _clean(self) -> None:
        """End what a killed engine left, and give back its mounts and its files."""
        self.kill()
        for process, _ in self._processes():
            with contextlib.suppress(psutil.Error):
                for each in (*process.children(recursive=True), process):
                    each.kill()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", target], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def answers(host: str) -> bool:
    """True when an engine answers there."""
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as caller:  # the SDK leaves its socket open where nobody listens
            if caller.connect_ex(host.removeprefix("unix://")):
                return False
    with contextlib.closing(docker.APIClient(base_url=host, version="1.41", timeout=10)) as client:
        try:
            return bool(client.ping())
        except (DockerException, requests.RequestException):
            return False
