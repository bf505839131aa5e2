"""What a worker offers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloudai.resources import GIB, MOST_GPUS, RunPhase
from cloudai.settings import load
from cloudai.wire import Register
from cloudai_agent import gpus
from cloudai_agent.loop import capacity
from cloudai_agent.process import ProcessRuntime
from tests.agent.conftest import Bench, eventually, started
from tests.agent.joined import MIB, joined

WRITE = "dd if=/dev/zero of=big bs=65536 count=800 2>/dev/null; echo ready; while :; do sleep 0.05; done"


def disk(monkeypatch: pytest.MonkeyPatch, used: Any) -> None:
    """Containers live on a disk of 1 GiB, of which `used()` bytes are taken."""
    for module in ("process.shutil", "docker.psutil"):
        monkeypatch.setattr(f"cloudai_agent.{module}.disk_usage", lambda _: SimpleNamespace(free=GIB - used()))


def test_what_its_tasks_have_written_is_offered_still(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = bench.open()
    disk(monkeypatch, lambda: sum(runtime.storage_used().values()))
    before = capacity(runtime, bench.settings, bound=True)
    run_id = started(runtime, bench.run(WRITE))
    eventually("it is seen", lambda: runtime.storage_used()[run_id] >= 50 * MIB)
    assert next(iter(runtime.read_log(run_id, 0))) == b"ready\n"
    assert capacity(bench.open(), bench.settings, bound=True) == before


async def test_an_agent_that_starts_anew_offers_as_much_storage_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, lambda: sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("big")))
    async with joined(tmp_path) as place:
        run = await place.run(WRITE, storage=100 * MIB)
        for _ in range(2):
            async with place.agent():
                await place.store.wait_log(run.task_id, run.attempt, 0, 60)
                assert (await place.until(await place.run("true"), RunPhase.SUCCEEDED)).exit_code == 0
                (state,) = await place.store.list_workers()
                assert state.worker.capacity.storage == GIB * 8 // 10


@pytest.mark.parametrize("cpu", ["0.001", "100000"])
@pytest.mark.parametrize("amount", ["0.001", "1048576"])
def test_whatever_a_worker_may_be_told_to_offer_can_be_registered(tmp_path: Path, cpu: str, amount: str) -> None:
    settings = load({"data_dir": tmp_path, "cpu": cpu, "memory": amount, "storage": amount, "gpu": "64"})
    offered = capacity(ProcessRuntime(settings), settings, bound=False)
    amounts = {name: getattr(offered, name) for name in ("cpu", "memory", "storage", "gpu")}
    told = Register(worker_id="w", identity="identity", address="", runtime="process", **amounts)
    assert told.capacity == offered


def test_of_more_gpus_than_a_worker_may_have_as_many_as_it_may_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load({"data_dir": tmp_path})
    for found, offered in ((0, 0), (8, 8), (MOST_GPUS + 1, MOST_GPUS)):
        monkeypatch.setattr(gpus, "count", lambda found=found: found)
        assert capacity(ProcessRuntime(settings), settings, bound=False).gpu == 1000 * offered
