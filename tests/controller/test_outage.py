"""The database goes away and comes back: the controller tries on, loses nothing and needs no help."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import RunPhase, TaskStatus
from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai_controller.loop import Controller
from tests.controller.driven import DEADLINE, HandClock, join, report, until_status, wish


@contextmanager
def database_away(directory: Path) -> Iterator[None]:
    file, aside = directory / "cloudai.db", directory / "aside.db"
    file.rename(aside)
    try:
        yield
    finally:
        aside.rename(file)


class Heard(logging.Handler):
    """Set once a line with some words is logged."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.event.set()


@contextmanager
def hearing(words: str) -> Iterator[asyncio.Event]:
    heard = Heard(words)
    log = logging.getLogger("cloudai.controller")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(heard)
    try:
        yield heard.event
    finally:
        log.removeHandler(heard)
        log.setLevel(before)


async def test_a_pass_without_the_database_fails_and_the_next_one_goes_on(
    tmp_path: Path, store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    with database_away(tmp_path):
        clock.forward(2)
        with pytest.raises(CloudAIError) as raised:
            await controller.step()
        assert raised.value.code is Code.UNAVAILABLE
    await report(store, task, RunPhase.STARTING, RunPhase.RUNNING)
    await until_status(controller, store, task, TaskStatus.RUNNING)


async def test_a_controller_that_runs_tries_on_until_the_database_is_back(tmp_path: Path, store: Store) -> None:
    stop = asyncio.Event()
    controller = Controller(store, Settings(), "one")
    async with asyncio.timeout(DEADLINE):
        with hearing("does not answer") as complained, hearing("answers again") as recovered:
            with database_away(tmp_path):
                running = asyncio.create_task(controller.run(stop))
                await complained.wait()
            await recovered.wait()
        stop.set()
        await running
    lease = await store.get_lease("controller")
    assert lease is not None
    assert lease.holder == ""
