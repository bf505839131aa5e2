"""Kubernetes' quantities (`500m`, `2Gi`) and the integers that everything is computed with."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}
LARGEST = 2**63 - 1
_FAR = 40  # an exponent beyond which everything is the largest number, or the smallest
_FORM = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:[eE]([+-]?[0-9]{1,9})|([numkKMGTPE]i?|))", re.ASCII)


def parse(quantity: str | int | float) -> Decimal:
    """The exact amount. Raises ValueError for what is no quantity."""
    match = _FORM.fullmatch(str(quantity))
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise ValueError(f"{quantity!r} is no quantity such as 500m or 2Gi")
    amount = Decimal(match[1])
    if match[2]:
        return amount.scaleb(max(-_FAR, min(_FAR, int(match[2]))))
    return amount * _SUFFIXES[match[3] or ""]


@lru_cache
def milli(quantity: str | int | float) -> int:
    """Thousandths, rounded up as Kubernetes does; at most the largest number of 64 bits."""
    return min(LARGEST, int((parse(quantity) * 1000).to_integral_value(ROUND_CEILING)))


@lru_cache
def whole(quantity: str | int | float) -> int:
    """Units (bytes, devices), rounded up; at most the largest number of 64 bits."""
    return min(LARGEST, int(parse(quantity).to_integral_value(ROUND_CEILING)))


def of_milli(amount: int) -> str:
    """`2` for 2000, `500m` for 500."""
    cores, rest = divmod(amount, 1000)
    return f"{amount}m" if rest else str(cores)


def of_bytes(amount: int) -> str:
    """The largest binary unit that gives a whole number: `2Gi`, `2560Mi`, `1000`."""
    for suffix in ("Ti", "Gi", "Mi", "Ki"):
        size = int(_SUFFIXES[suffix])
        if amount and amount % size == 0:
            return f"{amount // size}{suffix}"
    return str(amount)
