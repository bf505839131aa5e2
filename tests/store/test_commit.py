"""The controller's writes: whole groups, on the versions they were planned on, by the leader only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudai.resources import RunPhase, TaskStatus
from cloudai.store.protocol import FenceLost, Lease, Store
from tests.store.values import SPEC, finished, placed, placing


async def test_a_group_is_stored_with_new_versions_and_consecutive_revisions(store: Store) -> None:
    tasks = [await store.create_task(SPEC) for _ in range(3)]
    before = (await store.snapshot()).revision
    committed = await store.commit([placing(task) for task in tasks])
    assert committed.applied == [True] * 3
    assert (committed.first, committed.last) == (before + 1, before + 6)
    for group in committed.objects:
        assert (await store.get_tasks([group[0].task_id]))[group[0].task_id] == group[0]
        assert list((await store.get_runs([f"{group[0].task_id}-1"])).values()) == [group[1]]


async def test_a_stale_group_is_refused_whole_and_the_others_are_stored(store: Store) -> None:
    stale, fresh = await store.create_task(SPEC), await store.create_task(SPEC)
    await store.cancel_task(stale.task_id)
    committed = await store.commit([placing(stale), placing(fresh)])
    assert committed.applied == [False, True]
    assert committed.objects[0] == ()
    assert await store.list_runs(stale.task_id) == []


async def test_one_object_is_changed_once_a_commit(store: Store) -> None:
    task = await store.create_task(SPEC)
    assert (await store.commit([placing(task), placing(task)])).applied == [True, False]


async def test_a_run_that_exists_is_not_inserted_again(store: Store) -> None:
    _, run = await placed(store)
    assert (await store.commit([[replace(run, version=0)]])).applied == [False]


async def test_what_is_unknown_is_refused(store: Store) -> None:
    task = await store.create_task(SPEC)
    assert (await store.commit([[replace(task, task_id="task-7", version=1)]])).applied == [False]
    assert (await store.commit([[replace(task, task_id="task-7", version=0)]])).applied == [False]


async def test_a_forbidden_transition_is_an_error_and_changes_nothing(store: Store) -> None:
    task = await finished(store)
    other = await store.create_task(SPEC)
    with pytest.raises(ValueError, match="may not become"):
        await store.commit([placing(other), [replace(task, status=TaskStatus.QUEUED)]])
    assert await store.get_task(other.task_id) == other
    _, run = await placed(store)
    with pytest.raises(ValueError, match="may not become"):
        await store.commit([[replace(run, phase=RunPhase.RUNNING)]])


async def test_only_the_leader_writes(store: Store) -> None:
    assert await store.put_lease(Lease("controller", "one", 1, 0), 0)
    lease = await store.get_lease("controller")
    assert lease == Lease("controller", "one", 1, 1)
    task = await store.create_task(SPEC)
    assert (await store.commit([placing(task)], lease)).applied == [True]
    assert await store.put_lease(Lease("controller", "two", 2, 1), 1)
    with pytest.raises(FenceLost):
        await store.commit([placing(await store.create_task(SPEC))], lease)


async def test_a_lease_goes_to_who_is_first(store: Store) -> None:
    assert await store.put_lease(Lease("controller", "one", 1, 0), 0)
    assert not await store.put_lease(Lease("controller", "two", 1, 0), 0)
    assert await store.put_lease(Lease("controller", "one", 1, 1), 1)
    assert not await store.put_lease(Lease("controller", "two", 2, 1), 1)
    assert await store.get_lease("another") is None
