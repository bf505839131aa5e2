"""`cloudai up` and the client commands, as real processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

PATIENCE = 60
CLOUDAI = [sys.executable, "-m", "cloudai"]
INHERITED = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDAI_")}
SETTINGS = INHERITED | {"CLOUDAI_RATE_LIMIT_ENABLED": "false", "CLOUDAI_STOP_GRACE_SECONDS": "1"}


class Up:
    """`cloudai up` in a process; `block` is what it printed until it was ready."""

    def __init__(self, data_dir: Path, *flags: str, **environment: str) -> None:
        command = [*CLOUDAI, "up", "--data-dir", str(data_dir), "--runtime", "process", "--health-port", "0", *flags]
        self.errors = data_dir.with_suffix(".log")
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                command if "--port" in flags else [*command, "--port", "0"],
                env=SETTINGS | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.block = self._block()
        self.url = re.findall(r"API +(\S+)", self.block)[0]

    def _block(self) -> str:
        lines = []
        assert self.process.stdout
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        else:
            raise AssertionError(f"up ended: {lines} {self.errors.read_text()}")
        watchdog.cancel()
        return "".join(lines)

    def cloudai(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = SETTINGS | {"CLOUDAI_SERVER": self.url}
        return subprocess.run(
            [*CLOUDAI, *arguments], env=environment, text=True, capture_output=True, check=False, timeout=PATIENCE
        )

    def document(self, *arguments: str) -> Any:
        return json.loads(self.cloudai(*arguments, "--json").stdout)

    def submit(self, command: str, *flags: str) -> str:
        return self.cloudai("submit", "-i", "busybox", "--cpu", "0.1", *flags, "--", command).stdout.strip()

    def stop(self, signum: int = signal.SIGTERM) -> str:
        """What it printed at its end; its exit status must be 0."""
        self.process.send_signal(signum)
        output, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, self.errors.read_text()
        return str(output)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up") / "data")
    yield running
    running.stop()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def refused(data_dir: Path, *flags: str) -> str:
    """What a `cloudai up` that must not start says."""
    command = [*CLOUDAI, "up", "--data-dir", str(data_dir), *flags]
    done = subprocess.run(command, env=SETTINGS, text=True, capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2, done
    return done.stderr


def test_a_damaged_memory_of_the_worker_is_told_in_a_line(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "agent-w.json").write_text("{")
    said = refused(data_dir, "--worker-id", "w", "--runtime", "process")
    assert "remove it to join as a new worker" in said
    assert "Traceback" not in said


def test_the_block_says_where_it_is_and_which_runtime(up: Up) -> None:
    assert "runtime process: asked for" in up.block
    assert "WARNING" in up.block
    assert f"export CLOUDAI_SERVER={up.url}" in up.block


def test_wait_shows_the_logs_and_exits_as_the_task_did(up: Up) -> None:
    done = up.cloudai("submit", "--wait", "-i", "busybox", "--cpu", "0.1", "--", "echo out; echo err >&2; exit 7")
    assert done.returncode == 7
    assert set(done.stdout.splitlines()) == {"out", "err"}
    assert "failed: ExitCode" in done.stderr


def test_on_a_terminal_what_follows_a_log_has_a_line_of_its_own(up: Up) -> None:
    ours, its = pty.openpty()
    command = [*CLOUDAI, "submit", "--wait", "-i", "busybox", "--cpu", "0.1", "--", "printf words"]
    subprocess.run(
        command, env=SETTINGS | {"CLOUDAI_SERVER": up.url}, stdout=its, stderr=its, check=True, timeout=PATIENCE
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    assert "words" in shown.decode().splitlines()


def test_a_closed_standard_output_takes_no_status_away(up: Up) -> None:
    line = f"{sys.executable} -m cloudai submit --wait -i busybox --cpu 0.1 -- 'echo words; exit 7' >&-"
    done = subprocess.run(line, shell=True, env=SETTINGS | {"CLOUDAI_SERVER": up.url}, check=False, timeout=PATIENCE)
    assert done.returncode == 7


def test_several_words_are_a_program_and_its_arguments(up: Up) -> None:
    done = up.cloudai("submit", "--wait", "-i", "busybox", "--cpu", "0.1", "--", "echo", "$HOME", "a  b")
    assert done.returncode == 0
    assert done.stdout == "$HOME a  b\n"


def test_a_json_log_has_an_object_a_line_with_its_tasks_and_tracebacks(data_dir: Path) -> None:
    up = Up(data_dir, "--log-format", "json")
    task_id = up.submit("true")
    task = f"{up.url}/api/tasks/{task_id}"
    assert httpx.get(f"{task}?wait_seconds=60", timeout=PATIENCE + 10).json()["status"] == "completed"
    with contextlib.closing(sqlite3.connect(data_dir / "cloudai.db")) as database, database:
        database.execute("UPDATE tasks SET status = 'unheard of', version = version + 1")
    answer = httpx.get(task)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "INTERNAL")
    up.stop()
    lines = [json.loads(line) for line in up.errors.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    placed = next(line for line in lines if "attempt 1 placed" in line["message"])
    assert (placed["task_id"], placed["logger"], placed["level"]) == (task_id, "cloudai.controller", "info")
    fault = next(line for line in lines if line["level"] == "error")
    assert fault["error"].startswith("Traceback")
    assert "unheard of" in fault["error"]


def test_a_refused_submit_names_the_field(up: Up) -> None:
    done = up.cloudai("submit", "-i", "busybox", "--cpu", "-1", "--", "true")
    assert done.returncode == 1
    assert "req_cpu" in done.stderr
    assert done.stderr.count("\n") == 1


HANDSHAKE = "GET /ws/telemetry HTTP/1.1\nHost: localhost\nConnection: Upgrade\nUpgrade: websocket\n"
KEY = "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\n"


@pytest.mark.parametrize(
    ("request_text", "reason"),
    [
        ("what is this\n\n", "must be HTTP/1.1"),
        ("GET / HTTP/9.9\n\n", "must be HTTP/1.1"),
        ("GET /api/tasks HTTP/1.1\nHost localhost\n\n", "must be HTTP/1.1"),
        ("POST /api/tasks HTTP/1.1\nHost: localhost\nContent-Length: many\n\n", "must be HTTP/1.1"),
        (f"{HANDSHAKE}\n", "missing Sec-WebSocket-Key"),
        (f"{HANDSHAKE}{KEY}Sec-WebSocket-Version: 12\n\n", "invalid Sec-WebSocket-Version"),
        (f"{HANDSHAKE.replace('GET', 'POST')}{KEY}\n", "must be GET"),
    ],
)
def test_what_is_no_request_gets_an_error_of_the_documented_form(up: Up, request_text: str, reason: str) -> None:
    host, port = up.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection, connection.makefile("rb") as file:
        connection.sendall(request_text.replace("\n", "\r\n").encode())
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\ncontent-type: application/json" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["details"]["field"]) == ("INVALID_REQUEST", "request")
    assert reason in error["details"]["reason"]


def test_logs_are_followed_while_the_task_runs(up: Up, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    task_id = up.submit(f"echo first; cat {gate}; echo last")
    following = subprocess.Popen(
        [*CLOUDAI, "logs", "-f", task_id, "--server", up.url], env=SETTINGS, text=True, stdout=subprocess.PIPE
    )
    assert following.stdout
    assert following.stdout.readline() == "first\n"
    gate.write_text("middle\n")
    assert following.communicate(timeout=PATIENCE)[0] == "middle\nlast\n"
    assert up.cloudai("logs", task_id).stdout == "first\nmiddle\nlast\n"


def test_the_log_of_every_attempt_is_shown(up: Up) -> None:
    command = "echo attempt $CLOUDAI_ATTEMPT; exit 1"
    done = up.cloudai("submit", "--wait", "-i", "busybox", "--cpu", "0.1", "--max-retries", "3", "--", command)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-4:] == [f"attempt {number}" for number in range(1, 5)]


def test_who_waits_is_answered_when_the_api_stops(data_dir: Path) -> None:
    running = Up(data_dir)
    task_id = running.submit("sleep 1000")
    version = httpx.get(f"{running.url}/api/tasks/{task_id}?wait_seconds=30&version=1", timeout=PATIENCE).json()[
        "version"
    ]
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection, connection.makefile("rb") as file:
        path = f"/api/tasks/{task_id}?wait_seconds=60&version={version}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert httpx.get(f"{running.url}/healthz").status_code == 200  # so the one before is under way
        running.stop()
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    assert "Traceback" not in running.errors.read_text()


def test_a_followed_log_holds_up_no_stop_and_is_broken_off_in_silence(data_dir: Path) -> None:
    running = Up(data_dir, "--no-agent")
    task_id = running.submit("true")
    with httpx.stream("GET", f"{running.url}/api/tasks/{task_id}/logs?follow=true", timeout=PATIENCE) as answer:
        running.stop()
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            answer.read()
    errors = running.errors.read_text()
    assert not [words for words in ("Traceback", "graceful", "ASGI") if words in errors], errors


def test_a_second_ctrl_c_ends_it_at_once_and_without_a_traceback(data_dir: Path) -> None:
    running = Up(data_dir)
    host, port = running.url.removeprefix("http://").split(":")
    address = (host, int(port))
    with socket.create_connection(address, timeout=PATIENCE) as unfinished:  # which the API waits for when it stops
        head = (
            f"POST /api/tasks HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        unfinished.sendall(head.encode())
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        running.process.send_signal(signal.SIGINT)
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(address, timeout=PATIENCE).close()
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == -signal.SIGINT
    assert "Traceback" not in running.errors.read_text()


def test_a_cancelled_task_ends_cancelled(up: Up) -> None:
    task_id = up.submit("echo up; sleep 1000")
    assert up.cloudai("cancel", task_id).returncode == 0
    assert up.cloudai("wait", task_id).returncode == 125
    assert up.document("get", task_id)["status"] == "cancelled"


def test_of_several_tasks_to_cancel_one_that_is_none_holds_up_no_other(up: Up) -> None:
    task_id = up.submit("sleep 1000")
    done = up.cloudai("cancel", "none", task_id)
    assert (done.returncode, done.stderr) == (1, "Task not found: task_id none\n")
    assert up.cloudai("wait", task_id).returncode == 125


def test_a_waiting_task_says_why(up: Up) -> None:
    task_id = up.submit("true", "--memory", "100000")
    task = up.document("get", task_id)
    assert (task["status"], task["reason"]) == ("queued", "TooLargeForEveryWorker")
    assert task_id in up.cloudai("ps").stdout
    up.cloudai("cancel", task_id)
    assert task_id not in up.cloudai("ps").stdout
    assert task_id in up.cloudai("ps", "-a").stdout


def test_a_repeated_key_makes_one_task(up: Up) -> None:
    first = up.submit("true", "--idempotency-key", "once")
    assert up.submit("true", "--idempotency-key", "once") == first


def test_workers_and_status_show_the_machine(up: Up) -> None:
    up.cloudai("submit", "--wait", "-i", "busybox", "--cpu", "0.1", "--", "true")  # so the worker has joined
    (worker,) = up.document("workers")["workers"]
    assert worker["is_active"]
    assert worker["runtime"] == "process"
    assert worker["worker_id"] in up.cloudai("workers").stdout
    assert up.document("status")["total_workers"] == 1
    assert "1 active of 1" in up.cloudai("status").stdout


def test_an_unknown_task_is_refused(up: Up) -> None:
    done = up.cloudai("get", "task-1")
    assert done.returncode == 1
    assert done.stderr == "Task not found: task_id task-1\n"


def test_ctrl_c_while_waiting_leaves_the_task_running(up: Up) -> None:
    waiting = subprocess.Popen(
        [
            *CLOUDAI,
            "submit",
            "--wait",
            "-i",
            "busybox",
            "--cpu",
            "0.1",
            "--server",
            up.url,
            "--",
            "echo on; sleep 1000",
        ],
        env=SETTINGS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whatever a shell in between made of it
    )
    assert waiting.stdout
    assert waiting.stdout.readline() == "on\n"
    waiting.send_signal(signal.SIGINT)
    _, errors = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 130
    (task_id,) = re.findall(r"(task-\d+) goes on", errors)
    assert up.document("get", task_id)["status"] == "running"
    up.cloudai("cancel", task_id)
    assert up.cloudai("wait", task_id).returncode == 125


def test_a_second_up_on_the_same_data_directory_is_refused(up: Up) -> None:
    data_dir = up.errors.with_suffix("")
    said = refused(data_dir, "--port", "0")
    assert f"in use by another `cloudai up` (process {up.process.pid})" in said
    assert "--data-dir" in said


def test_a_taken_port_is_refused_with_the_flag_to_change(data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(data_dir, "--port", str(port))
    assert f"port {port}: Address already in use; choose another with --port" in said


def test_an_address_of_another_machine_is_refused(data_dir: Path) -> None:
    assert "--host" in refused(data_dir, "--host", "192.0.2.1")


def test_docker_without_an_engine_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "DOCKER_HOST", f"unix://{data_dir}/none.sock")
    assert "--runtime process" in refused(data_dir, "--runtime", "docker", "--port", "0")


@pytest.mark.docker
def test_auto_takes_docker_where_an_engine_answers_and_then_does_not_do_without(
    data_dir: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Up(data_dir, "--runtime", "auto", DOCKER_HOST=docker_host)
    assert "runtime docker: the Docker engine answers" in first.block
    assert "WARNING" not in first.block
    first.stop()
    monkeypatch.setitem(SETTINGS, "DOCKER_HOST", f"unix://{data_dir}/none.sock")
    said = refused(data_dir, "--runtime", "auto", "--port", "0")
    assert "The Docker engine does not answer (there is no socket). This worker has used Docker before" in said
    assert "start the engine, or give up on them with --runtime process" in said


@pytest.mark.docker
def test_auto_without_an_engine_takes_processes_says_so_in_one_line_and_stays_with_them(
    data_dir: Path, docker_host: str
) -> None:
    first = Up(data_dir, "--runtime", "auto", DOCKER_HOST=f"unix://{data_dir}/none.sock")
    (line,) = [line for line in first.block.splitlines() if "Docker" in line]
    assert "runtime process: no Docker engine answers: The Docker engine does not answer (there is no socket)" in line
    (warning,) = [line for line in first.block.splitlines() if "WARNING" in line]
    assert "plain processes" in warning
    first.stop()
    second = Up(data_dir, "--runtime", "auto", DOCKER_HOST=docker_host)
    assert "runtime process: as before; --runtime docker changes it" in second.block
    second.stop()


@pytest.mark.parametrize("content", [None, b"no database" * 500], ids=["a directory", "another file"])
def test_a_store_that_cannot_be_opened_is_refused(data_dir: Path, content: bytes | None) -> None:
    place = data_dir / "cloudai.db"
    data_dir.mkdir(exist_ok=True)
    place.mkdir() if content is None else place.write_bytes(content)
    said = refused(data_dir, "--port", "0")
    assert "cannot open the store" in said
    assert ("may this user write both?" in said) == (content is None)
    assert "Traceback" not in said


def test_a_data_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--data-dir" in refused(tmp_path / "file" / "data", "--port", "0")


def test_the_token_of_the_local_worker_is_its_own(up: Up) -> None:
    token = up.errors.with_suffix("") / "agent.token"
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_running_task_goes_on_and_is_taken_up_by_the_next_up(data_dir: Path, tmp_path: Path, ending: int) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = Up(data_dir)
    task_id = first.submit(f"echo began; cat {gate}; exit 5")
    until_it_writes = subprocess.Popen(
        [*CLOUDAI, "logs", "-f", task_id, "--server", first.url],
        env=SETTINGS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert until_it_writes.stdout
    assert until_it_writes.stdout.readline() == "began\n"
    until_it_writes.kill()
    until_it_writes.communicate()
    if ending == signal.SIGKILL:
        first.kill()
    else:
        assert "go on" in first.stop(ending)

    second = Up(data_dir)
    gate.write_text("passed\n")
    assert second.cloudai("wait", task_id).returncode == 5
    task = second.document("get", task_id)
    assert (task["attempt"], task["exit_code"]) == (1, 5)
    assert second.cloudai("logs", task_id).stdout == "began\npassed\n"
    second.stop()


def test_without_an_agent_tasks_wait(data_dir: Path) -> None:
    alone = Up(data_dir, "--no-agent")
    task_id = alone.submit("true")
    assert alone.document("get", task_id)["reason"] == "NoWorkers"
    assert alone.document("workers") == {"workers": []}
    alone.stop()
