"""Placements per second: queued tasks on simulated workers, each decision written durably to a SQLite file."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from pathlib import Path

from cloudai.resources import GIB, Resources, TaskSpec, Worker
from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai.store.sql import open_store
from cloudai_controller.loop import Controller
from tests.bench.table import Row, at_least

WORKERS = 1_000
TASKS = 100_000
MEASURED = 20_000
SHAPES = [Resources(250 * cores, GIB * cores // 4, 0, 0) for cores in (1, 2, 4, 8)]
SUBMITS_AT_ONCE = 2_000


async def run(tasks: int = TASKS, measured: int = MEASURED) -> dict[str, float]:
    """Queue `tasks`, then let a controller place until `measured` are placed.

    Returns `placed`, `seconds`, `per_second` (from the first pass with everything read), `load_seconds` (reading it).
    """
    with tempfile.TemporaryDirectory() as directory:
        store = await open_store(f"sqlite:///{Path(directory) / 'cloudai.db'}")
        try:
            await fill(store, tasks)
            return await place(store, min(measured, tasks))
        finally:
            await store.close()


async def fill(store: Store, tasks: int) -> None:
    now = time.time_ns() // 1_000_000
    for number in range(WORKERS):
        name = f"worker-{number:04}"
        capacity = Resources(64_000, 256 * GIB, 1000 * GIB, 0)
        await store.register_worker(
            Worker(
                worker_id=name,
                identity=f"identity-{name}",
                address="10.0.0.1:50052",
                capacity=capacity,
                runtime="docker",
                registered_at=now,
                last_heartbeat=now,
            )
        )
    await queue(store, tasks)


async def queue(store: Store, tasks: int, cores: int = 0) -> None:
    """Submit `tasks`, each of `cores` or as SHAPES says."""
    for start in range(0, tasks, SUBMITS_AT_ONCE):
        numbers = range(start, min(start + SUBMITS_AT_ONCE, tasks))
        await asyncio.gather(*(store.create_task(_wish(number, cores)) for number in numbers))


def _wish(number: int, cores: int) -> TaskSpec:
    return TaskSpec(
        user_id=f"user-{number % 100}",
        image="docker.io/library/ubuntu:latest",
        command=f"echo {number}",
        resources=Resources(1000 * cores, GIB, 0, 0) if cores else SHAPES[number % len(SHAPES)],
    )


async def place(store: Store, wanted: int) -> dict[str, float]:
    # Nobody beats for the workers while the measurement lasts.
    controller = Controller(store, Settings(heartbeat_seconds=3600, lease_seconds=math.inf), "bench")
    try:
        began = time.perf_counter()
        placed = (await controller.step()).applied  # the first pass reads everything
        loaded = time.perf_counter()
        first = placed
        while placed < wanted:
            applied = (await controller.step()).applied
            if not applied:
                raise RuntimeError(f"only {placed} of {wanted} tasks found a place")
            placed += applied
        seconds = time.perf_counter() - loaded
    finally:
        await controller.close()
    return {
        "placed": placed,
        "seconds": seconds,
        "per_second": (placed - first) / seconds,
        "load_seconds": loaded - began,
    }


def rows() -> list[Row]:
    figures = asyncio.run(run())
    what = f"placements/s, {TASKS:,} queued, {WORKERS:,} workers"
    return [at_least(what, figures["per_second"], 1500, "make bench ARGS=placements")]


if __name__ == "__main__":
    print(asyncio.run(run()))
