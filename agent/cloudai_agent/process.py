"""No engine: tasks as plain processes of this user, for trying CloudAI out. Nothing is isolated and no amount is enforced.

A run has a directory, and everything is read back from its files, so that a new agent finds what an earlier one started:
`run.json` says what to run, `started` that it was (never twice), `log` holds both streams. A small shell process (the
shim) in a session of its own writes `pid` when it begins and `exit` when the command has ended, with the exit code that
Docker would give.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil

from cloudai.resources import Reason, Resources, Run
from cloudai.settings import Settings
from cloudai_agent.runtime import Container, ContainerState, RunRefused, device_list

LOOK_SECONDS = 0.02  # how often the end of a process, and more of its log, is looked for
KILL_SECONDS = 10.0  # how long a killed process may take to vanish
MARK = "CLOUDAI_RUN_ID"  # in the environment of every process of a run
KILLED = 137

# $0 is the run's directory, "$@" the command. A file appears as a whole or not at all.
SHIM = """
cd "$0/work" && echo $$ >"$0/pid.new" && mv "$0/pid.new" "$0/pid" || exit 1
"$@" </dev/null >>"$0/log" 2>&1
echo $? >"$0/exit.new" && mv "$0/exit.new" "$0/exit"
"""


class ProcessRuntime:
    """Implements Runtime. The image of a run is ignored."""

    kind: Literal["docker", "process"] = "process"

    def __init__(self, settings: Settings) -> None:
        self._data_dir = Path(settings.data_dir).absolute()
        self._base: Path | None = None
        self._shims: dict[str, subprocess.Popen[bytes]] = {}
        self._watched: set[str] = set()
        self._started = threading.Condition()
        self._closed = False

    def bind(self, cluster_id: str, worker_id: str) -> None:
        self._base = self._data_dir / "process" / cluster_id / worker_id
        self._base.mkdir(parents=True, exist_ok=True)

    def ping(self) -> None:
        """A process can always be started."""

    def close(self) -> None:
        with self._started:
            self._closed = True
            self._started.notify_all()

    def capacity(self) -> Resources:
        place = next(path for path in (self._data_dir, *self._data_dir.parents) if path.exists())
        memory, storage = psutil.virtual_memory().total, shutil.disk_usage(place).free
        return Resources(1000 * (psutil.cpu_count() or 1), memory, storage, 0)

    # -- what there is

    def containers(self) -> list[Container]:
        found = (self.container(path.name) for path in self._directory("").iterdir())
        return [container for container in found if container is not None]

    def container(self, run_id: str) -> Container | None:
        place = self._directory(run_id)
        if not (place / "run.json").exists():
            return None
        task_id, _, attempt = run_id.rpartition("-")
        state, code, error = self._state(run_id)
        if state is ContainerState.RUNNING:
            self._watch(run_id)
        return Container(
            run_id=run_id,
            task_id=task_id,
            attempt=int(attempt),
            state=state,
            started_at=_written_at(place / "pid"),
            finished_at=_written_at(place / "exit"),
            exit_code=code,
            error=error,
        )

    def _state(self, run_id: str) -> tuple[ContainerState, int | None, str | None]:
        place = self._directory(run_id)
        if not (place / "started").exists():
            return ContainerState.CREATED, None, None
        if self._exit_code(run_id) is None and self._shim(run_id) is not None:
            return ContainerState.RUNNING, None, None
        code = self._exit_code(run_id)  # again: it may have ended between the two looks
        if code is None:
            return ContainerState.EXITED, KILLED, "the process that waits for the command was killed"
        return ContainerState.EXITED, code, None

    def _exit_code(self, run_id: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int((self._directory(run_id) / "exit").read_text())
        return None

    def _shim(self, run_id: str) -> psutil.Process | None:
        """The living shim of a run. Its mark is checked, since its number may be another process's by now."""
        try:
            process = psutil.Process(int((self._directory(run_id) / "pid").read_text()))
            return process if process.environ().get(MARK) == run_id else None
        except FileNotFoundError:
            # Started a moment ago, by this agent or by one that was killed.
            return next((process for process in self._marked(run_id) if os.getsid(process.pid) == process.pid), None)
        except (psutil.Error, OSError):
            return None

    def _marked(self, run_id: str) -> Iterator[psutil.Process]:
        """Every living process of a run, those that left its session too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == run_id:
                    yield process

    # -- what is done

    def has_image(self, image: str) -> bool:  # noqa: ARG002
        return True

    def pull(self, image: str, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        """Images are ignored."""

    def create(self, run: Run) -> None:
        if run.command is None:
            raise RunRefused(
                Reason.START_FAILED,
                "The process runtime ignores images, so it cannot know an image's own command: give the task a command.",
            )
        place = self._directory(run.run_id)
        (place / "work").mkdir(parents=True, exist_ok=True)
        command = ["/bin/sh", "-c", run.command] if isinstance(run.command, str) else list(run.command)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "HOME": str(place / "work"),
            "CLOUDAI_TASK_ID": run.task_id,
            "CLOUDAI_ATTEMPT": str(run.attempt),
            MARK: run.run_id,
        }
        if run.gpus:
            environment |= {"CUDA_VISIBLE_DEVICES": device_list(run.gpus)}
        fresh = place / "run.new"
        fresh.write_text(json.dumps({"command": command, "environment": environment}))
        fresh.replace(place / "run.json")

    def start(self, run_id: str) -> None:
        place = self._directory(run_id)
        wish = json.loads((place / "run.json").read_text())
        command, environment = wish["command"], wish["environment"]
        if shutil.which(_from(place / "work", command[0]), path=environment["PATH"]) is None:
            raise RunRefused(
                Reason.COMMAND_NOT_FOUND,
                f"There is no command {command[0]!r} on this worker; check the spelling, or give a string for a shell.",
            )
        try:
            (place / "started").touch(exist_ok=False)
        except FileExistsError:
            return  # once is enough, even where nobody lived to see it
        (place / "log").touch()
        self._shims[run_id] = subprocess.Popen(
            ["/bin/sh", "-c", SHIM, str(place), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._watch(run_id)

    def stop(self, run_id: str, grace_seconds: float) -> None:
        shim = self._shim(run_id)
        if shim is None:
            return
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
            for process in self._marked(run_id):
                if process != shim:  # it lives to tell how the command ended
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if self._state(run_id)[0] is ContainerState.EXITED:
                    return
                time.sleep(LOOK_SECONDS)

    def remove(self, run_id: str) -> None:
        for process in self._marked(run_id):  # what the command left behind
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._directory(run_id))

    def read_log(self, run_id: str, offset: int) -> Iterator[bytes]:
        try:
            log = (self._directory(run_id) / "log").open("rb")
        except FileNotFoundError:
            return
        with log:
            log.seek(offset)
            while True:
                ended = self._state(run_id)[0] is ContainerState.EXITED
                while piece := log.read(65536):
                    yield piece
                if ended or self._closed:
                    return
                time.sleep(LOOK_SECONDS)

    def storage_used(self) -> dict[str, int]:
        return {path.name: _size(path / "work") for path in self._directory("").iterdir()}

    # -- ends

    def _watch(self, run_id: str) -> None:
        with self._started:
            self._watched.add(run_id)
            self._started.notify_all()

    def events(self) -> Iterator[str | None]:
        while not self._closed:
            with self._started:
                self._started.wait_for(lambda: self._watched or self._closed)
                watched = list(self._watched)
            for run_id in watched:
                shim = self._shims.get(run_id)
                ended = shim.poll() is not None if shim else self._state(run_id)[0] is ContainerState.EXITED
                if ended:
                    self._shims.pop(run_id, None)
                    with self._started:
                        self._watched.discard(run_id)
                    yield run_id
            time.sleep(LOOK_SECONDS)

    def _directory(self, run_id: str) -> Path:
        assert self._base is not None, "bind() comes first"
        return self._base / run_id


def _from(directory: Path, command: str) -> str:
    """A command with a slash in it is looked for from the working directory."""
    return str(directory / command) if "/" in command else command


def _written_at(path: Path) -> int | None:
    """When (ms) a file was written, None where it is not."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns // 1_000_000
    return None


def _size(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total
