"""An event loop whose time jumps to what is due next, and a clock by it: hours of waiting, exact and at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. It may wait for times and for futures, and for nothing outside of the loop."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


class JumpingClock:
    """Both clocks, by the loop that runs."""

    def now(self) -> int:
        return round(self.elapsed() * 1000)

    def elapsed(self) -> float:
        return asyncio.get_running_loop().time()


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._at = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._at

    def jump(self, seconds: float) -> None:
        self._at += seconds


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing would ever happen again"
        self._loop.jump(timeout)
        return super().select(0)
