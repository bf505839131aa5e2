"""What an engine says seldom: a server of the tests' own says it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cloudai.resources import Resources, Run
from cloudai.settings import Settings
from cloudai_agent.docker import DockerRuntime
from cloudai_agent.runtime import EngineDown, RunRefused

GOING = {"message": "connection error: dial unix /run/containerd/containerd.sock: connect: connection refused"}
SILENT = {
    "message": 'Head "https://registry.example/v2/image/manifests/1": Get "https://auth.example/token": context deadline '
    "exceeded (Client.Timeout exceeded while awaiting headers)"
}
NEVER = "0001-01-01T00:00:00Z"
OURS = {"cloudai.cluster": "cluster", "cloudai.worker": "worker", "cloudai.task": "task-1", "cloudai.attempt": "1"}
RUN = Run(
    task_id="task-1",
    attempt=1,
    worker_id="worker",
    user_id="ann",
    image="busybox",
    command="true",
    resources=Resources(1000, 64 * 1024 * 1024, 0, 0),
)


class Engine(BaseHTTPRequestHandler):
    """Knows itself, lists a container that has lost its name, and can do nothing more."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            self._say(200, {"ApiVersion": "1.44", "MinAPIVersion": "1.24"})
        elif self.path.endswith("/info"):
            self._say(200, {"NCPU": 2, "MemTotal": 1 << 30})
        elif "/containers/json" in self.path:
            self._say(200, [{"Id": "1", "Names": [], "Labels": OURS}, {"Id": "2", "Names": None, "Labels": OURS}])
        elif self.path.endswith("/containers/task-1-1/json"):
            state = {
                "Status": "created",
                "StartedAt": NEVER,
                "FinishedAt": NEVER,
                "Error": "",
                "ExitCode": 0,
                "OOMKilled": False,
            }
            self._say(200, {"Id": "3", "Name": "/task-1-1", "Config": {"Labels": OURS}, "State": state})
        else:
            self._say(500, GOING)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._say(500, SILENT if "/images/create" in self.path else GOING)

    def _say(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerRuntime]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_address[1]}")
    runtime = DockerRuntime(Settings())
    runtime.bind("cluster", "worker")
    yield runtime
    runtime.close()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_container_without_a_name_is_nobodys(runtime: DockerRuntime) -> None:
    assert runtime.containers() == []
    assert runtime.storage_used() == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda runtime: runtime.has_image("busybox"),
        lambda runtime: runtime.create(RUN),
        lambda runtime: runtime.start("task-1-1"),
    ],
    ids=["image", "create", "start"],
)
def test_an_engine_whose_containerd_is_gone_says_nothing_of_the_run(
    runtime: DockerRuntime, call: Callable[[DockerRuntime], object]
) -> None:
    with pytest.raises(EngineDown, match="is shutting down"):
        call(runtime)


def test_a_registry_that_does_not_answer_in_time_is_no_fault_of_the_engine(runtime: DockerRuntime) -> None:
    with pytest.raises(RunRefused, match="context deadline exceeded") as refused:
        runtime.pull("registry.example/image:1", lambda _: None, lambda: False)
    assert refused.value.reason == "ImagePullFailed"
