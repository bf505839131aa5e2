"""Every change is seen, once, in order, by every process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from cloudai.store import reading, sql
from cloudai.store.protocol import Change, Kind, Pruned, Store
from cloudai.store.sql import open_store
from cloudai.store.upkeep import CHANGES
from tests.store.values import SPEC, WORKER, finished


async def seen(changes: AsyncIterator[Sequence[Change]], count: int) -> list[Change]:
    found: list[Change] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await anext(changes)
    return found


async def test_changes_come_in_order_with_what_happened(store: Store) -> None:
    task = await finished(store)
    found = await seen(store.watch(0), 8)
    assert [change.revision for change in found] == list(range(1, 9))
    assert [(change.kind, change.event) for change in found] == [
        (Kind.TASK, "queued"),
        (Kind.TASK, "pending"),
        (Kind.RUN, "assigned"),
        (Kind.RUN, "starting"),
        (Kind.RUN, "running"),
        (Kind.RUN, "succeeded"),
        (Kind.TASK, "running"),
        (Kind.TASK, "completed"),
    ]
    assert {change.key for change in found} == {task.task_id, f"{task.task_id}-1"}


async def test_a_watcher_from_now_sees_what_comes(store: Store) -> None:
    await store.create_task(SPEC)
    watch = store.watch()
    first = asyncio.ensure_future(anext(watch))
    while not first.done():  # "now" is some time after the watch was asked for
        await store.register_worker(WORKER)
    assert {(change.kind, change.key) for change in await first} == {(Kind.WORKER, "worker-1")}


@pytest.mark.parametrize("writers", [["here"], ["there", "here"]], ids=["own", "after another's"])
async def test_what_is_committed_while_a_watcher_looks_is_told_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch, writers: list[str]
) -> None:
    monkeypatch.setattr(sql, "REPAIR_SECONDS", 3600)
    stores = {name: await open_store(url) for name in ("here", "there")}
    read = stores["here"]._read
    written: list[str] = []

    async def late(query: Callable[..., Any], *arguments: Any) -> Any:
        """The answer is out of date when it comes."""
        found = await read(query, *arguments)
        while query is reading.changes and len(written) < len(writers):
            written.append((await stores[writers[len(written)]].create_task(SPEC)).task_id)
        return found

    monkeypatch.setattr(stores["here"], "_read", late)
    monkeypatch.setattr(stores["here"], "_nearby", lambda *_: None)  # which takes no time
    found = await seen(stores["here"].watch(0), len(writers))
    assert [change.key for change in found] == written
    for store in stores.values():
        await store.close()


async def test_who_asks_for_what_was_pruned_must_list_again(store: Store) -> None:
    for _ in range(5):
        await store.create_task(SPEC)
    await store.prune_changes(2)
    other = store.watch(4)
    assert [change.revision for change in await anext(other)] == [5]
    await store.close()


async def test_a_pruned_or_future_revision_is_told(url: str) -> None:
    store = await open_store(url)
    for _ in range(5):
        await store.create_task(SPEC)
    await store.prune_changes(2)
    await store.close()
    store = await open_store(url)
    for revision in (1, 99):
        with pytest.raises(Pruned):
            await anext(store.watch(revision))
    assert [change.revision for change in await anext(store.watch(3))] == [4, 5]
    await store.close()


async def test_many_changes_are_pruned_in_several_goes(store: Store) -> None:
    await asyncio.gather(*(store.create_task(SPEC) for _ in range(CHANGES + 2)))
    assert await store.prune_changes(1) == CHANGES
    assert await store.prune_changes(1) == 1
    assert await store.prune_changes(1) == 0


async def test_another_process_s_writes_are_seen_without_gaps(url: str) -> None:
    stores = [await open_store(url) for _ in range(2)]
    watching = [asyncio.ensure_future(seen(store.watch(0), 200)) for store in stores]
    await asyncio.gather(*(store.create_task(SPEC) for store in stores for _ in range(100)))
    for found in await asyncio.gather(*watching):
        assert [change.revision for change in found] == list(range(1, 201))
    assert stores[0].cluster_id == stores[1].cluster_id
    for store in stores:
        await store.close()
