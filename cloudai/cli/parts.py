"""Parts put together: each is a coroutine that runs until it is told to stop, all of them in one event loop.

Nothing of the facade, the controller or the agent is known here.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import click
import uvloop

GARBAGE = 50_000  # objects made and kept between two looks for garbage

T = TypeVar("T")
# Runs until its event is set.
Part = Callable[[asyncio.Event], Awaitable[None]]


def run_until_signal(body: Part) -> None:
    """Run `body` in a new event loop; TERM or Ctrl-C sets its stop event, a second one ends the process at once."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def asked(signum: int) -> None:
            stop.set()
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_DFL)  # and not Python's own, which raises wherever it happens to be

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, asked, signum)
        await body(stop)

    # What is there by now stays, and what comes later is little garbage in cycles: look for it seldom.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def together(parts: Sequence[Part], stop: asyncio.Event) -> None:
    """Run `parts` until `stop` or until one of them ends, then stop them last to first, each before those it needs.

    Raises what the first failed part raised.
    """
    events = [asyncio.Event() for _ in parts]
    tasks = [asyncio.ensure_future(part(event)) for part, event in zip(parts, events, strict=True)]
    asked = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([*tasks, asked], return_when=asyncio.FIRST_COMPLETED)
        for event, task in reversed(list(zip(events, tasks, strict=True))):
            event.set()
            await asyncio.wait([task])
    finally:
        asked.cancel()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def unless(stop: asyncio.Event, work: Awaitable[T]) -> T | None:
    """What `work` comes to; None, with `work` cancelled, where `stop` is set before."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
    return working.result() if done else None


def started_by(ready: asyncio.Event, part: Part) -> Part:
    """`part`, started when `ready` is set."""

    async def run(stop: asyncio.Event) -> None:
        await unless(stop, ready.wait())
        if not stop.is_set():
            await part(stop)

    return run


def announcement(ready: asyncio.Event, text: str) -> Part:
    """A part that only prints `text` when `ready` is set."""

    async def announce(stop: asyncio.Event) -> None:
        click.echo(text)
        await stop.wait()

    return started_by(ready, announce)
