"""A real store in a file, and a controller whose clocks the test sets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai.store.sql import open_store
from cloudai_controller.loop import Controller
from tests.controller.driven import HandClock


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:///{tmp_path}/cloudai.db")
    yield store
    await store.close()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def controller(store: Store, clock: HandClock) -> AsyncIterator[Controller]:
    controller = Controller(store, Settings(), "one", clock)
    yield controller
    await controller.close()
