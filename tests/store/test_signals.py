"""Who waits is woken by what it waits for, whichever process wrote that, and by nothing else."""

from __future__ import annotations

import asyncio

import pytest

from cloudai.store import sql
from cloudai.store.protocol import Change, Kind
from cloudai.store.signals import Signals
from cloudai.store.sql import open_store
from tests.engines.postgres import Postgres
from tests.store.values import SPEC, placed

PATIENCE = 60


async def test_a_follower_is_woken_by_its_own_log_and_its_task_s_changes_only() -> None:
    signals = Signals()
    first, second = (asyncio.ensure_future(signals.log(f"task-{number}", PATIENCE)) for number in (1, 2))
    await asyncio.sleep(0)
    signals.foreign()
    signals.committed([Change(1, Kind.RUN, "task-3-1", "failed")], ["task-4"])
    signals.logged(["task-2"])
    await second
    assert not first.done()
    signals.learned([Change(2, Kind.RUN, "task-1-1", "failed")])
    await first


async def test_another_process_s_log_wakes_its_follower(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "REPAIR_SECONDS", 3600)
    url = postgres.create("followed")
    here, there = await open_store(url), await open_store(url)
    task, run = await placed(there)
    end = 0
    async with asyncio.timeout(PATIENCE):
        following = asyncio.ensure_future(here.wait_log(task.task_id, 1, 0, 3600))
        while not following.done():  # it may not listen yet
            end = await there.append_log(run.run_id, end, b"x")
    await here.close()
    await there.close()


async def test_what_a_process_commits_itself_is_nothing_to_ask_the_database_for(postgres: Postgres) -> None:
    url = postgres.create("own")
    here, there = await open_store(url), await open_store(url)
    seen = here.watch(0)
    first = asyncio.ensure_future(anext(seen))
    others = 1
    async with asyncio.timeout(PATIENCE):
        while not first.done():  # it may not listen yet
            await there.create_task(SPEC)
            others += 1
        for _ in range(200):
            await here.create_task(SPEC)
        last = await there.create_task(SPEC)
        while last.task_id not in {change.key for change in await anext(seen)}:
            pass
    assert here._signals.others < others + 100  # a lost signal is looked for now and then
    await here.close()
    await there.close()
