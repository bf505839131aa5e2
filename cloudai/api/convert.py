"""Between the API's units (cores, GiB, GPUs; `2025-11-16T10:30:00Z`) and the integers everything is computed with."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from cloudai.resources import GIB


def milli(amount: float) -> int:
    """Cores or GPUs as thousandths. What is more than nothing stays more than nothing, since 0 means none."""
    return max(round(amount * 1000), 1) if amount > 0 else 0


def byte_count(gib: float) -> int:
    """GiB as bytes; more than nothing stays more than nothing, since 0 bytes of storage would mean no limit."""
    return max(round(gib * GIB), 1) if gib > 0 else 0


def units(thousandths: int) -> float:
    """Cores or GPUs: the nearest float, which prints with at most three decimals."""
    return thousandths / 1000


def gib(amount: int) -> float:
    """Bytes as GiB, exactly: sums of such numbers stay exact."""
    return amount / GIB


@lru_cache(maxsize=4096)
def wished_gib(amount: int) -> float:
    """Bytes as the shortest number of GiB that stands for them, so that a client reads the 0.1 that it sent."""
    exact = amount / GIB
    for digits in range(10):
        short = round(exact, digits)
        if byte_count(short) == amount:
            return short
    return exact


@lru_cache(maxsize=4096)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:19] + "Z"


def instant(ms: int) -> str:
    """Milliseconds since the epoch as the documented time, in whole seconds."""
    return _second(ms // 1000)


def maybe_instant(ms: int | None) -> str | None:
    return None if ms is None else _second(ms // 1000)
