"""The two clocks of the controller: what time it is, and how much time has passed."""

from __future__ import annotations

import time
from typing import Protocol

from cloudai.clock import now_ms


class Clock(Protocol):
    def now(self) -> int:
        """Wall time in ms since the epoch, comparable with what the store holds."""
        ...

    def elapsed(self) -> float:
        """Seconds on a clock that nobody sets."""
        ...


class SystemClock:
    def now(self) -> int:
        return now_ms()

    def elapsed(self) -> float:
        return time.monotonic()
