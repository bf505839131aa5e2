"""What time it is, in the unit that everything here counts in."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Wall time in ms since the epoch."""
    return time.time_ns() // 1_000_000
