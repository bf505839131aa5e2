"""The changes that follow a store over Kubernetes: what a database's change log promises, of one process's own count."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from cloudai.resources import TaskStatus
from cloudai.store.kube.revisions import KEPT, Revisions
from cloudai.store.protocol import Kind, Pruned
from tests.kube.kube import Place
from tests.store.worlds import OBEDIENT, on_kubernetes


async def test_changes_come_once_and_in_order() -> None:
    revisions = Revisions()
    for number in range(3):
        revisions.add(Kind.TASK, f"t{number}", "queued")
    changes = revisions.after(0)
    assert [change.revision for change in await anext(changes)] == [1, 2, 3]
    revisions.add(Kind.RUN, "t1-1", "running")
    (change,) = await anext(changes)
    assert (change.revision, change.kind, change.key, change.event) == (4, Kind.RUN, "t1-1", "running")


async def test_a_watcher_from_now_sees_what_comes() -> None:
    revisions = Revisions()
    revisions.add(Kind.TASK, "before", "queued")
    waiting = asyncio.ensure_future(anext(revisions.after(None)))
    await asyncio.sleep(0)  # "now" is when the watch is first asked
    revisions.add(Kind.TASK, "after", "queued")
    assert [change.key for change in await waiting] == ["after"]


@pytest.mark.parametrize("since", [0, KEPT + 100], ids=["pruned", "future"])
async def test_a_revision_that_is_not_known_is_told(since: int) -> None:
    revisions = Revisions()
    for number in range(KEPT + 1):
        revisions.add(Kind.TASK, str(number), "queued")
    with pytest.raises(Pruned):
        await anext(revisions.after(since))
    assert len(await anext(revisions.after(1))) == KEPT


async def test_a_task_s_life_is_followed_through_a_real_cluster(shared: Place) -> None:
    async with on_kubernetes(shared, operated=True) as world:
        task = await world.store.create_task(OBEDIENT)
        await world.run(task.task_id)
        await world.end(task.task_id)
        seen = await anext(world.store.watch(0))
    assert [change.revision for change in seen] == list(range(1, len(seen) + 1))
    of_task = [change.event for change in seen if (change.kind, change.key) == (Kind.TASK, task.task_id)]
    told = [event for event, _ in itertools.groupby(of_task) if event != "updated"]
    assert told[0] == TaskStatus.QUEUED.value
    assert told[-2:] == [TaskStatus.RUNNING.value, TaskStatus.COMPLETED.value]
    assert [change.event for change in seen if change.key == f"{task.task_id}-1"][-1] == "succeeded"
