"""The cluster that tests and developers use: it ends when it is told to, as a whole, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.binaries import Missing, programs
from tests.cluster.cluster import saved
from tests.e2e.cluster import eventually
from tests.engines import missing

START = """\
import sys
from pathlib import Path
from tests.cluster.binaries import programs
from tests.cluster.cluster import start
start(Path(sys.argv[1]), programs(), played=0, dies_with_us=False)
"""


def inside(first: int) -> list[psutil.Process]:
    """The processes of the same namespace."""
    space = os.readlink(f"/proc/{first}/ns/pid")
    return [process for process in psutil.process_iter() if namespace(process.pid) == space]


def namespace(process: int) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return ""


@pytest.mark.timeout(300)
def test_a_cluster_that_outlived_who_started_it_ends_as_a_whole(tmp_path: Path) -> None:
    try:
        programs()
    except Missing as lacking:
        missing("Kubernetes", str(lacking))
    directory = tmp_path / "cluster"
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        try:
            subprocess.run([sys.executable, "-c", START, str(directory)], check=True)
            cluster = saved(directory)
            assert cluster is not None
            assert cluster.ready
            members = inside(cluster.first)
            assert {"etcd", "kubelet", "containerd", "kwok"} <= {member.name() for member in members}
            etcd = next(member for member in members if member.name() == "etcd")
            etcd.suspend()  # and who started it there: it waits for it
            eventually("both are stopped", lambda: psutil.Process(etcd.ppid()).status() == psutil.STATUS_STOPPED)
            etcd.resume()
            cluster.stop()
            assert psutil.wait_procs(members, timeout=10)[1] == []
            assert bystander.poll() is None
        finally:
            bystander.kill()
    assert saved(directory) is None
    assert not Path(f"/sys/class/net/cloudai{cluster.number}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/cloudai-{cluster.number}"))
    cluster.stop()  # which ends nothing any more
