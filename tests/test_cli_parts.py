"""Parts in one event loop: they end in order, and the failure of one ends all."""

from __future__ import annotations

import asyncio

import pytest

from cloudai.cli.parts import Part, started_by, together


def noted(name: str, notes: list[str]) -> Part:
    async def run(stop: asyncio.Event) -> None:
        await stop.wait()
        notes.append(name)

    return run


async def test_parts_stop_last_to_first() -> None:
    notes: list[str] = []
    stop = asyncio.Event()
    stop.set()
    await together([noted("api", notes), noted("controller", notes), noted("agent", notes)], stop)
    assert notes == ["agent", "controller", "api"]


async def test_a_part_that_fails_stops_the_others_and_is_raised() -> None:
    notes: list[str] = []

    async def failing(_: asyncio.Event) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await together([noted("api", notes), failing], asyncio.Event())
    assert notes == ["api"]


async def test_a_part_starts_when_what_it_needs_is_ready() -> None:
    notes: list[str] = []
    ready, stop = asyncio.Event(), asyncio.Event()
    running = asyncio.ensure_future(started_by(ready, noted("agent", notes))(stop))
    ready.set()
    stop.set()
    await running
    assert notes == []  # told to stop before it began


async def test_a_part_that_waits_for_its_start_can_be_stopped() -> None:
    stop = asyncio.Event()
    stop.set()
    await started_by(asyncio.Event(), noted("agent", []))(stop)
