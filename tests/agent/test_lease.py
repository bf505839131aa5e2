"""A lease counts from when the last acknowledged heartbeat was sent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from cloudai_agent.lease import Lease
from cloudai_agent.memory import recall
from cloudai_agent.reconcile import Cause, Ordered


def test_a_lease_ends_its_seconds_after_the_last_acknowledged_heartbeat_was_sent() -> None:
    lease = Lease(seconds=300)
    lease.renew(1000)
    assert not lease.over(1299)
    assert lease.over(1300)


def test_an_answer_to_an_older_heartbeat_shortens_nothing() -> None:
    lease = Lease(seconds=300)
    lease.renew(1000)
    lease.renew(900)
    assert lease.ends_at() == 1300


def test_an_infinite_lease_never_ends() -> None:
    lease = Lease(seconds=None)
    lease.renew(1)
    assert not lease.over(1e12)


def test_who_never_joined_has_nothing_to_lose() -> None:
    assert not Lease(seconds=300).over(1e12)


def test_an_agent_remembers_who_it_is_and_how_long_its_lease_holds(tmp_path: Path) -> None:
    memory = recall(tmp_path, "worker-1")
    memory.joins("cluster")
    memory.lease = Lease(60, 12.5)
    memory.ordered["task-1-1"] = Ordered(Cause.STORAGE, 1000)
    memory.save()
    assert recall(tmp_path, "worker-1") == memory
    assert recall(tmp_path, "worker-2").identity != memory.identity


def test_a_broken_memory_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent-worker-1.json").write_text("{")
    with pytest.raises(ValueError, match="agent-worker-1"):
        recall(tmp_path, "worker-1")


def test_an_agent_knows_who_it_is_though_the_machine_lost_power_over_its_last_heartbeat(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = recall(tmp_path, "worker-1")
    memory.joins("cluster")
    memory.save()
    (tmp_path / "lease-worker-1.json").write_bytes(b"")  # what a file system may leave of a file not yet on disk
    again = recall(tmp_path, "worker-1")
    assert (again.identity, again.cluster_id, again.lease) == (memory.identity, "cluster", Lease())
    assert "lease-worker-1.json cannot be read" in caplog.text


def test_who_the_worker_is_is_on_disk_before_it_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr("cloudai_agent.memory.os.fsync", noting)
    memory = recall(tmp_path, "worker-1")
    memory.joins("cluster")
    memory.joins("cluster")
    memory.save()
    assert synced == ["agent-worker-1.new"] * 2


def test_a_full_disk_leaves_the_older_memory(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = recall(small_disk, "worker-1")
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"x" * 4096):
            pass
    memory.lease.renew(1000)
    memory.save()
    assert "cannot be written" in caplog.text
    assert recall(small_disk, "worker-1").lease == Lease()
