"""Brings the view up to date with the store: all of it once, then the keys that changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cloudai.resources import Run, Task
from cloudai.store.protocol import Store
from cloudai_controller.clock import Clock
from cloudai_controller.feed import Keys
from cloudai_controller.state import Terms, View

BREATH = 1000  # tasks taken in at a stretch, while others of the process wait


async def load(store: Store, terms: Terms, clock: Clock) -> tuple[View, int]:
    """Everything active, and the revision it was read at."""
    snapshot = await store.snapshot()
    now = clock.now()
    view = View(terms, now)
    for worker in snapshot.workers.values():
        view.put_worker(worker, now)
    view.looked_at = now
    for number, task in enumerate(snapshot.tasks.values()):
        view.put_task(task)
        if number % BREATH == 0:
            await asyncio.sleep(0)
    for run in snapshot.runs.values():
        view.put_run(run)
    return view, snapshot.revision


async def read(store: Store, view: View, keys: Keys, clock: Clock) -> None:
    """Look at the changed keys. Tasks go first: a run that has ended is kept only for its task."""
    if keys.tasks:
        tasks = await store.get_tasks(keys.tasks)
        for task_id in keys.tasks:
            if task_id in tasks:
                view.put_task(tasks[task_id])
            else:
                view.drop_task(task_id)
    if keys.runs:
        runs = await store.get_runs(keys.runs)
        for key in keys.runs:
            if key in runs:
                view.put_run(runs[key])
            else:
                view.drop_run(key.rpartition("-")[0], key)
    if keys.workers:
        await refresh(store, view, clock, keys.workers)


async def refresh(store: Store, view: View, clock: Clock, worker_ids: list[str] | None = None) -> None:
    """Read workers again (None: all), since a heartbeat leaves no change in the log."""
    workers = await store.get_workers(worker_ids)
    read_at = clock.now()
    for worker in workers.values():
        view.put_worker(worker, read_at)
    for worker_id in list(view.workers) if worker_ids is None else worker_ids:
        if worker_id not in workers:
            view.drop_worker(worker_id)
    if worker_ids is None:
        view.looked_at = read_at


def keys_of(groups: Iterable[tuple[Task | Run, ...]]) -> Keys:
    """Where to look after a refusal: the tasks and runs of the refused groups, and the runs' tasks."""
    keys = Keys([], [], [])
    for group in groups:
        for item in group:
            keys.tasks.append(item.task_id)
            if isinstance(item, Run):
                keys.runs.append(item.run_id)
    return Keys(list(dict.fromkeys(keys.tasks)), list(dict.fromkeys(keys.runs)), [])
