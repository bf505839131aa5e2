"""No engine: tasks as plain processes of this user, for trying CloudAI out. Nothing is isolated and no amount is enforced.

A run has a directory. `run.json` says what to run; a small shell process (the shim) in a session of its own runs it with
both streams in `log`, writes `pid` before it begins and into `exit` when the command has ended. All is read back from
there, so that a new agent finds what an earlier one started. Exit codes are what Docker would say.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil

from cloudai.resources import Reason, Resources, Run
from cloudai.settings import Settings
from cloudai_agent.processes import EXIT_PLACE, Shim, die, ended_by, processes_of, spawn
from cloudai_agent.runtime import Container, ContainerState, RunRefused, device_list

LOOK_SECONDS = 0.05  # how often a log is looked at for more
SWEEP_SECONDS = 10.0  # a killed process may hang in the kernel; nobody waits for it longer


class ProcessRuntime:
    """Implements Runtime. The image of a run is ignored."""

    kind: Literal["docker", "process"] = "process"

    def __init__(self, settings: Settings) -> None:
        self._root = settings.data_dir.absolute() / "process"
        self._ours = self._root / "unbound"
        self._lock = threading.Lock()
        self._awaited: dict[str, threading.Event] = {}  # set once the run has ended
        self._listeners: list[queue.SimpleQueue[str | None]] = []
        self._closed = threading.Event()

    def bind(self, cluster_id: str, worker_id: str) -> None:
        self._ours = self._root / cluster_id / worker_id
        self._ours.mkdir(parents=True, exist_ok=True)
        for left in self._ours.glob(".*"):  # half made or half removed when an agent was killed
            _remove_tree(left)

    def ping(self) -> None:
        """There is no engine that could be down."""

    def capacity(self) -> Resources:
        self._root.mkdir(parents=True, exist_ok=True)
        return Resources(
            cpu=1000 * len(os.sched_getaffinity(0)),
            memory=psutil.virtual_memory().total,
            storage=shutil.disk_usage(self._root).free,
            gpu=0,
        )

    # -- what there is

    def containers(self) -> list[Container]:
        names = [path.name for path in self._ours.iterdir() if not path.name.startswith(".")]
        return [container for name in names if (container := self.container(name)) is not None]

    def container(self, run_id: str) -> Container | None:
        home = self._ours / run_id
        try:
            container = self._seen(run_id, home)
        except FileNotFoundError:
            if (home / "run.json").exists():
                raise
            return None
        # A removal takes the directory away first: what was read of it meanwhile counts for nothing.
        return container if home.exists() else None

    def _seen(self, run_id: str, home: Path) -> Container:
        run = json.loads((home / "run.json").read_bytes())
        shim = Shim.of(home)
        state = ContainerState.CREATED
        exit_code = finished_at = None
        if shim is not None:
            self._await(run_id, shim)
            state = ContainerState.RUNNING
            if not shim.alive():
                state = ContainerState.EXITED
                exit_code, finished_at, told = ended_by(home)
                if not told:  # nobody ended what the command started
                    self._sweep(home, shim)
        return Container(
            run_id=run_id,
            task_id=run["task_id"],
            attempt=run["attempt"],
            state=state,
            started_at=shim.started_at if shim else None,
            finished_at=finished_at,
            exit_code=exit_code,
        )

    def storage_used(self) -> dict[str, int]:
        return {path.name: _size(path / "work") for path in self._ours.iterdir() if not path.name.startswith(".")}

    # -- images: none

    def has_image(self, image: str) -> bool:  # noqa: ARG002
        return True

    def pull(self, image: str, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        """Nothing to fetch."""

    # -- the life of a run

    def create(self, run: Run) -> None:
        if not run.command:
            raise RunRefused(
                Reason.START_FAILED,
                "This worker runs tasks as processes, without images, so the task needs a command; give it one, or run "
                "the worker where Docker is.",
            )
        home = self._ours / run.run_id
        if home.exists():
            return
        new = self._ours / f".new-{run.run_id}"
        command = ["/bin/sh", "-c", run.command] if isinstance(run.command, str) else list(run.command)
        try:
            _prepare(new, home, run, command)
        except OSError as error:
            _remove_tree(new)
            raise RunRefused(
                Reason.START_FAILED,
                f"The worker cannot write to {self._ours} ({error.strerror}); make room there, then submit the task again.",
            ) from None
        new.rename(home)

    def start(self, run_id: str) -> None:
        home = self._ours / run_id
        if Shim.of(home) is not None:
            return
        try:
            run = json.loads((home / "run.json").read_bytes())
        except FileNotFoundError:
            raise RunRefused(
                Reason.START_FAILED, f"The directory of this run, {home}, is gone; submit the task again."
            ) from None
        _check(run["command"][0], home / "work", run["environment"]["PATH"])
        shim = spawn(home, run["command"], run["environment"])
        self._await(run_id, shim)
        self._tell(run_id)

    def stop(self, run_id: str, grace_seconds: float) -> None:
        home = self._ours / run_id
        shim = Shim.of(home)
        if shim is None:
            return
        ended = self._await(run_id, shim)
        if shim.alive():
            shim.signal_group(signal.SIGTERM)
            for stray in processes_of(home, shim):
                if stray.pid != shim.pid and not shim.leads(stray.pid):
                    die(stray, signal.SIGTERM)
        if not ended.wait(grace_seconds):
            self._kill(home, shim, ended)
        self._sweep(home, shim)

    def _kill(self, home: Path, shim: Shim, ended: threading.Event) -> None:
        """End every process of a run but the shim, which then writes how the command ended."""
        while not ended.is_set():
            shim.signal_group(signal.SIGCONT)  # a task may have stopped its whole group, the shim included
            for process in processes_of(home, shim):
                if process.pid != shim.pid:
                    die(process, signal.SIGKILL)
            ended.wait(LOOK_SECONDS)

    def _sweep(self, home: Path, shim: Shim) -> None:
        """End what left the session of the ended run."""
        deadline = time.monotonic() + SWEEP_SECONDS
        while left := [process for process in processes_of(home, shim) if process.pid != shim.pid]:
            for process in left:
                die(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(LOOK_SECONDS)

    def remove(self, run_id: str) -> None:
        home = self._ours / run_id
        if not home.exists():
            return
        self.stop(run_id, 0)
        gone = self._ours / f".gone-{run_id}"
        with contextlib.suppress(FileNotFoundError):
            home.rename(gone)
        _remove_tree(gone)
        with self._lock:
            self._awaited.pop(run_id, None)
        self._tell(run_id)

    # -- following

    def read_log(self, run_id: str, offset: int) -> Iterator[bytes]:
        home = self._ours / run_id
        try:
            log = (home / "log").open("rb", buffering=0)
        except FileNotFoundError:
            return
        with log:
            log.seek(offset)
            while True:
                shim = Shim.of(home)
                ended = self._await(run_id, shim) if shim else None
                over = not home.exists() or (ended is not None and ended.is_set())  # looked at before the last read
                while piece := log.read(65536):
                    yield piece
                if over or self._closed.is_set():
                    return
                if ended is not None:
                    ended.wait(LOOK_SECONDS)
                else:
                    time.sleep(LOOK_SECONDS)

    def events(self) -> Iterator[str | None]:
        listener: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._lock:
            self._listeners.append(listener)
        yield None
        while not self._closed.is_set():
            yield listener.get()

    def _tell(self, run_id: str) -> None:
        with self._lock:
            for listener in self._listeners:
                listener.put(run_id)

    def _await(self, run_id: str, shim: Shim) -> threading.Event:
        """The event of the run's end. The first to ask starts the thread that waits for it."""
        with self._lock:
            ended = self._awaited.get(run_id)
            if ended is not None:
                return ended
            ended = self._awaited[run_id] = threading.Event()
        if not shim.alive():
            ended.set()
            return ended

        def wait() -> None:
            shim.wait()
            ended.set()
            self._tell(run_id)

        threading.Thread(target=wait, name=f"end-{run_id}", daemon=True).start()
        return ended

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for listener in self._listeners:
                listener.put(None)


def _prepare(new: Path, home: Path, run: Run, command: list[str]) -> None:
    """What a run needs that will live in `home`, in a directory of another name, so that it is there whole or not at all."""
    (new / "work").mkdir(parents=True, exist_ok=True)
    devices = device_list(run.gpus)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home / "work"),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "CLOUDAI_TASK_ID": run.task_id,
        "CLOUDAI_ATTEMPT": str(run.attempt),
        "CUDA_VISIBLE_DEVICES": devices,
        "NVIDIA_VISIBLE_DEVICES": devices or "void",
    }
    text = {"task_id": run.task_id, "attempt": run.attempt, "command": command, "environment": environment}
    (new / "run.json").write_text(json.dumps(text))
    (new / "exit").write_text(EXIT_PLACE)
    (new / "log").touch()


def _check(program: str, work: Path, path: str) -> None:
    """Say what is wrong with a program before it is run, as an engine does."""
    place = str(work / program) if "/" in program else program
    if shutil.which(place, path=path):
        return
    if "/" in program and Path(place).exists():
        raise RunRefused(
            Reason.START_FAILED, f"{program} is not an executable file; make it one, or run it with its interpreter."
        )
    raise RunRefused(
        Reason.COMMAND_NOT_FOUND,
        f"This worker has no program {program!r}; it runs tasks as processes, without images. Correct the command or "
        "install the program.",
    )


def _remove_tree(path: Path) -> None:
    for folder, _, _ in os.walk(path):  # a task may have taken its own rights away
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    """Bytes on disk below a directory."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total
