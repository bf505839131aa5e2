"""The processes of a run of the process runtime: the shim that starts the command and says how it ended, and its kin."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cloudai.resources import Reason
from cloudai_agent.runtime import KILLED, RunRefused

EXIT_PLACE = "    \n"  # what `exit` holds until the command has ended
MARK = "CLOUDAI_RUN_DIR"  # in the environment of every process of a run: finds those that left its session
START_SECONDS = 10.0  # longest time for the shim to begin

# $0 is the run's directory, "$@" the command. `pid` is written before anything else and never twice (set -C): whoever comes
# second ends at once, so a command starts once even where the agent died while it started it. The shim itself outlives a
# TERM to its group, since it has to write `exit`, over what holds the place (<>), since the disk may be full by then; at last
# it ends what the command left behind in the group, and itself.
SHIM = r"""
trap 'told=1' TERM INT HUP
set -C
read -r boot </proc/sys/kernel/random/boot_id
read -r stat <"/proc/$$/stat"
echo "$boot $stat" >"$0/pid" || exit 1
set +C
[ -z "$told" ] || { echo 143 1<>"$0/exit"; exit; }
( cd "$0/work" && exec "$@" ) </dev/null >>"$0/log" 2>&1
echo $? 1<>"$0/exit"
kill -KILL 0
"""


@dataclass(frozen=True, slots=True)
class Shim:
    """The shim of a run, as it wrote itself down. Boot and start time tell it from another process with its pid."""

    pid: int
    boot: str
    ticks: str  # start time in clock ticks since the boot, as /proc has it
    started_at: int  # ms since the epoch

    @staticmethod
    def of(home: Path) -> Shim | None:
        """Of a run's directory; None before it has begun."""
        try:
            path = home / "pid"
            boot, _, stat = path.read_text().partition(" ")
            if not stat.endswith("\n"):
                return None
            return Shim(int(stat.split()[0]), boot, _ticks(stat), path.stat().st_mtime_ns // 1_000_000)
        except FileNotFoundError:
            return None

    def alive(self) -> bool:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return boot == self.boot and _ticks(stat) == self.ticks and stat.rpartition(")")[2].split()[0] not in "ZX"

    def wait(self) -> None:
        """Until it has ended; an own child is reaped."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            while self.alive():
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(timeout=60)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)

    def signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def leads(self, pid: int) -> bool:
        """True for a process in the shim's own process group."""
        try:
            return os.getpgid(pid) == self.pid
        except ProcessLookupError:
            return False


def _ticks(stat: str) -> str:
    return stat.rpartition(")")[2].split()[19]


def spawn(home: Path, command: Sequence[str], environment: Mapping[str, str]) -> Shim:
    """Start a run's shim; returns once it has begun."""
    pid = os.posix_spawn(
        "/bin/sh",
        ["/bin/sh", "-c", SHIM, str(home), *command],
        {**environment, MARK: str(home)},
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXFSZ],
    )
    deadline = time.monotonic() + START_SECONDS
    over = False
    while (shim := Shim.of(home)) is None:  # a short command may have begun and ended before the first look
        if over:
            raise RunRefused(
                Reason.START_FAILED,
                f"The shell that runs the command did not begin in {home}; look at the worker, then submit it again.",
            )
        time.sleep(0.001)
        over = time.monotonic() > deadline or os.waitpid(pid, os.WNOHANG)[0] != 0
    return shim


def ended_by(home: Path) -> tuple[int, int, bool]:
    """Exit code and time (ms) of a run whose shim is gone, and whether it told them.

    It did not where it was ended from outside, or the machine was restarted.
    """
    path = home / "exit"
    try:
        return int(path.read_text()), path.stat().st_mtime_ns // 1_000_000, True
    except (FileNotFoundError, ValueError):
        noticed = home / "killed"  # who looks first says when
        if not noticed.exists():
            noticed.touch()
        return KILLED, noticed.stat().st_mtime_ns // 1_000_000, False


def processes_of(home: Path, shim: Shim) -> Iterator[psutil.Process]:
    """Every living process of a run: of its session, or with its mark."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            ours = os.getsid(process.pid) == shim.pid and process.create_time() >= shim.started_at / 1000 - 60
            if (ours or process.environ().get(MARK) == str(home)) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def die(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
