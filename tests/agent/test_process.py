"""Tasks as plain processes: what only this runtime does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cloudai.resources import GpuShare
from cloudai_agent import gpus, telemetry
from cloudai_agent.processes import Shim
from cloudai_agent.runtime import ContainerState, RunRefused, Runtime
from tests.agent.conftest import MIB, Bench, bench_of, ended, eventually, finished, found, started


@pytest.fixture
def runtime(on_processes: Bench) -> Runtime:
    return on_processes.open()


def home_of(bench: Bench, run_id: str) -> Path:
    return bench.settings.data_dir / "process" / bench.cluster / "worker-1" / run_id


def until_gone(process: psutil.Process) -> None:
    """A killed process runs nothing any more, but on a busy machine its number lives a little longer."""

    def gone() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        return True

    eventually("the process is gone", gone)


def test_a_command_is_needed(on_processes: Bench, runtime: Runtime) -> None:
    with pytest.raises(RunRefused, match="needs a command") as refused:
        runtime.create(on_processes.run(None))
    assert refused.value.reason == "StartFailed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [("nosuchprogram", "CommandNotFound"), ("/nosuch/program", "CommandNotFound"), ("/etc/passwd", "StartFailed")],
)
def test_a_program_that_cannot_run_is_told_at_the_start(
    on_processes: Bench, runtime: Runtime, program: str, reason: str
) -> None:
    run = on_processes.run((program, "x"))
    runtime.create(run)
    with pytest.raises(RunRefused, match=program) as refused:
        runtime.start(run.run_id)
    assert refused.value.reason == reason
    assert found(runtime, run.run_id).state is ContainerState.CREATED


def test_every_image_is_there(runtime: Runtime) -> None:
    assert runtime.has_image("No Such Name")
    runtime.pull("No Such Name", print, lambda: False)


def test_the_environment_is_small_and_the_home_is_the_working_directory(
    on_processes: Bench, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "hidden")
    run = replace(on_processes.run("env; echo WHERE=$(pwd)"), gpus=(GpuShare(2, 1000),))
    log = finished(runtime, run)[1].decode()
    values = dict(line.split("=", 1) for line in log.splitlines())
    assert values["HOME"] == values["WHERE"] == str(home_of(on_processes, run.run_id) / "work")
    assert values["CUDA_VISIBLE_DEVICES"] == "2"
    assert "hidden" not in log


def test_what_left_the_session_is_ended_by_a_stop(on_processes: Bench, runtime: Runtime) -> None:
    command = "setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.05; done' & exec sleep 1000"
    run_id = started(runtime, on_processes.run(command))
    stray = psutil.Process(int(next(iter(runtime.read_log(run_id, 0)))))
    runtime.stop(run_id, 30)
    assert found(runtime, run_id).exit_code == 143
    until_gone(stray)


def test_what_has_stopped_its_whole_group_is_ended_by_a_stop(on_processes: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_processes.run("trap '' TERM; echo $$; kill -STOP 0; sleep 1000"))
    command = psutil.Process(int(next(iter(runtime.read_log(run_id, 0)))))
    eventually("it has stopped itself", lambda: command.status() == psutil.STATUS_STOPPED)
    runtime.stop(run_id, 0.1)
    assert found(runtime, run_id).exit_code == 137
    until_gone(command)


def test_a_run_outlives_the_agent_that_started_it(on_processes: Bench, tmp_path: Path) -> None:
    run = on_processes.run("echo up; trap 'exit 9' TERM; while :; do sleep 0.05; done 2>/dev/null")
    on_processes.open().create(run)
    starter = (
        "import os, sys; from pathlib import Path; from cloudai.settings import Settings;"
        "from cloudai_agent.process import ProcessRuntime; data, cluster, run_id = sys.argv[1:];"
        "runtime = ProcessRuntime(Settings(data_dir=Path(data))); runtime.bind(cluster, 'worker-1');"
        "runtime.start(run_id); os.kill(os.getpid(), 9)"
    )
    words = [sys.executable, "-c", starter, str(on_processes.settings.data_dir), on_processes.cluster, run.run_id]
    killed = subprocess.run(words, check=False)
    assert killed.returncode == -signal.SIGKILL
    heir = on_processes.open()
    assert found(heir, run.run_id).state is ContainerState.RUNNING
    assert next(iter(heir.read_log(run.run_id, 0))) == b"up\n"
    heir.stop(run.run_id, 30)
    assert found(heir, run.run_id).exit_code == 9


def test_another_process_with_the_number_of_a_shim_is_not_taken_for_it(on_processes: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_processes.run("exit 4"))
    ended(runtime, run_id)
    home = home_of(on_processes, run_id)
    shim = Shim.of(home)
    assert shim is not None
    (home / "pid").write_text((home / "pid").read_text().replace(f" {shim.pid} ", f" {os.getpid()} ", 1))
    again = on_processes.open()
    assert found(again, run_id).state is ContainerState.EXITED
    again.stop(run_id, 0)  # and not the test that runs here
    assert found(again, run_id).exit_code == 4


def test_a_shim_that_was_killed_tells_of_it_and_leaves_nobody(on_processes: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_processes.run("echo $$; exec sleep 1000"))
    command = psutil.Process(int(next(iter(runtime.read_log(run_id, 0)))))
    shim = Shim.of(home_of(on_processes, run_id))
    assert shim is not None
    killed_at = time.time_ns() // 1_000_000 - 10  # file times are those of a coarser clock
    os.kill(shim.pid, signal.SIGKILL)
    end = ended(runtime, run_id)
    assert end.exit_code == 137
    assert (end.finished_at or 0) >= killed_at
    until_gone(command)


def fill(disk: Path) -> None:
    """Leave no room."""
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"x" * 4096):
            pass


def test_a_worker_without_room_refuses_a_run_and_says_why(small_disk: Path) -> None:
    with bench_of("process", small_disk, "ignored") as bench:
        runtime = bench.open()
        run = bench.run("true")
        fill(small_disk)
        with pytest.raises(RunRefused, match=r"No space left on device.*make room there") as refused:
            runtime.create(run)
        assert refused.value.reason == "StartFailed"
        assert runtime.containers() == []
        (small_disk / "ballast").unlink()
        assert finished(runtime, run)[0].exit_code == 0


def test_how_a_command_ended_is_known_though_the_disk_was_full(small_disk: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with bench_of("process", small_disk, "ignored") as bench:
        runtime = bench.open()
        run_id = started(runtime, bench.run(f"echo ready; cat {gate} >/dev/null; exit 5"))
        assert next(iter(runtime.read_log(run_id, 0))) == b"ready\n"
        fill(small_disk)
        gate.write_text("")
        end = ended(runtime, run_id)
        assert end.exit_code == 5
        assert (end.finished_at or 0) >= (end.started_at or 0)
        (small_disk / "ballast").unlink()


def test_what_a_task_made_unreadable_is_removed_too(on_processes: Bench, runtime: Runtime) -> None:
    run = on_processes.run("mkdir -p deep/er && touch deep/er/file && chmod 000 deep/er deep")
    finished(runtime, run)
    runtime.remove(run.run_id)
    assert not home_of(on_processes, run.run_id).exists()


def test_only_what_the_task_writes_counts_as_storage(on_processes: Bench, runtime: Runtime) -> None:
    run = on_processes.run("head -c 1048576 /dev/zero > file; yes | head -c 4194304")
    finished(runtime, run)
    assert MIB <= runtime.storage_used()[run.run_id] < 2 * MIB


def test_the_machine_is_measured() -> None:
    cpu, memory = telemetry.usage()
    assert 0 <= cpu <= 100
    assert 0 < memory <= 100
    assert gpus.count() >= 0


def test_what_an_ended_run_left_running_ends_when_it_is_removed(on_processes: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_processes.run("setsid sh -c 'echo $$; while :; do sleep 0.05; done' & sleep 0.3"))
    stray = psutil.Process(int(next(iter(runtime.read_log(run_id, 0)))))
    ended(runtime, run_id)
    assert stray.is_running()
    runtime.remove(run_id)
    until_gone(stray)


def test_what_a_killed_agent_left_half_made_is_swept(on_processes: Bench, runtime: Runtime) -> None:
    run = on_processes.run("true")
    half = home_of(on_processes, f".new-{run.run_id}")
    (half / "work").mkdir(parents=True)
    heir = on_processes.open()
    assert not half.exists()
    assert heir.containers() == []
    assert finished(heir, run)[0].exit_code == 0


def test_readers_end_when_the_runtime_is_closed(on_processes: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, on_processes.run("echo ready; while :; do sleep 0.05; done"))
    log, events = iter(runtime.read_log(run_id, 0)), iter(runtime.events())
    assert next(log) == b"ready\n"
    assert next(events) is None
    runtime.close()
    assert list(log) == []
    assert set(events) <= {None, run_id}
