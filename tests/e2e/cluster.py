"""A CloudAI of real processes for end-to-end tests: `cloudai api`, `controller` and `agent`, each started, killed and
started again at will. Nothing in here knows how they work inside; it speaks the documented API.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.engines import dies_with_us

PATIENCE = 60.0  # seconds; whatever takes longer counts as never
SETTINGS = {
    "CLOUDAI_HEARTBEAT_SECONDS": "1",
    "CLOUDAI_STOP_GRACE_SECONDS": "1",
    "CLOUDAI_RATE_LIMIT_ENABLED": "false",
    "CLOUDAI_LOG_LEVEL": "debug",
}
MIB = 1 / 1024  # of a GiB
FINISHED = ("completed", "failed", "cancelled")

T = TypeVar("T")


def eventually(what: str, probe: Callable[[], T | None], patience: float = PATIENCE) -> T:
    """The first true answer of `probe`; an AssertionError that names `what` when none comes in time."""
    deadline = time.monotonic() + patience
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)
    return answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Part:
    """One process of CloudAI, with its output in a file."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*dies_with_us(), *command], env=environment, cwd=directory, stdout=output, stderr=output
            )

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self, patience: float = 20) -> int:
        """TERM, as an operator would; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Cluster:
    """The processes of one test, all on loopback, all in one directory."""

    def __init__(self, directory: Path, runtime: str, environment: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.runtime = runtime
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDAI_")}
        self.environment = inherited | SETTINGS | {"CLOUDAI_DATA_DIR": str(directory / "data")} | (environment or {})
        self.parts: list[Part] = []
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.token_file = directory / "token"

    # -- processes

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A `cloudai` command that ends by itself."""
        command = [sys.executable, "-m", "cloudai", *arguments]
        environment = self.environment | {"CLOUDAI_SERVER": self.url}
        return subprocess.run(
            command, env=environment, cwd=self.directory, text=True, capture_output=True, check=check, timeout=PATIENCE
        )

    def start(self, name: str, *arguments: str, **environment: str) -> Part:
        command = [sys.executable, "-m", "cloudai", *arguments]
        part = Part(name, command, self.environment | environment, self.directory)
        self.parts.append(part)
        return part

    def api(self, name: str = "api") -> Part:
        part = self.start(name, "api", "--port", str(self.port))
        eventually("the API answers", lambda: self.answers(part))
        if not self.token_file.exists():
            self.token_file.write_text(self.run("token", "create").stdout.split()[-1])
        return part

    def controller(self, name: str = "controller") -> Part:
        return self.start(name, "controller")

    def agent(self, worker_id: str = "worker-1", *flags: str, server: str | None = None) -> Part:
        part = self.start(
            worker_id,
            "agent",
            *("--server", server or self.url),
            *("--token-file", str(self.token_file)),
            *("--worker-id", worker_id),
            *("--runtime", self.runtime),
            *("--health-port", "0"),
            *(flags or ("--cpu", "4", "--memory", "2", "--storage", "10")),
        )
        eventually(f"{worker_id} is active", lambda: self.worker(worker_id).get("is_active"))
        return part

    def start_all(self) -> None:
        """API, controller and one agent."""
        self.api()
        self.controller()
        self.agent()

    def answers(self, part: Part | None = None) -> bool:
        if part and part.process.poll() is not None:
            raise AssertionError(f"{part.name} ended: {part.log.read_text()}")
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/healthz").status_code == 200
        return False

    def close(self) -> None:
        for part in self.parts:
            if part.process.poll() is None:
                part.resume()
                part.stop()
        self.http.close()

    # -- the API

    def submit(self, image: str, command: str | list[str] | None, **fields: Any) -> str:
        """The id of a task that was acknowledged."""
        body = {
            "user_id": "tester",
            "docker_image": image,
            "req_cpu": 0.1,
            "req_memory": 32 * MIB,
            "req_storage": 0,
            "req_gpu": 0,
        }
        answer = self.http.post("/api/tasks", json=body | {"command": command} | fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/tasks/{task_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def worker(self, worker_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/api/workers/{worker_id}").json())

    def cancel(self, task_id: str) -> httpx.Response:
        return self.http.post(f"/api/tasks/{task_id}/cancel")

    def logs(self, task_id: str, **query: Any) -> str:
        return self.http.get(f"/api/tasks/{task_id}/logs", params=query).text

    def until(self, task_id: str, *statuses: str) -> dict[str, Any]:
        """The task once it has one of these statuses."""

        def there() -> dict[str, Any] | None:
            with contextlib.suppress(httpx.TransportError):
                task = self.task(task_id)
                if task["status"] in statuses:
                    return task
                assert task["status"] not in FINISHED, task
            return None

        return eventually(f"{task_id} is {' or '.join(statuses)}", there)

    def finished(self, task_ids: Iterable[str]) -> list[dict[str, Any]]:
        """These tasks, once all of them ended."""
        return [self.until(task_id, *FINISHED) for task_id in task_ids]
