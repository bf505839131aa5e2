"""One row of the table that `make bench` prints: ours beside the yardstick, and the ratio against what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Row:
    """`ours` and `yardstick` as text; `met` when `figure` is what was asked for."""

    what: str
    ours: str
    yardstick: str
    figure: str
    asked: str
    met: bool
    command: str

    def __str__(self) -> str:
        mark = "ok  " if self.met else "MISS"
        return f"{mark} {self.what:<44} {self.ours:>16} {self.yardstick:>16} {self.figure:>9} {self.asked:>9}   {self.command}"


HEADER = f"     {'what':<44} {'ours':>16} {'yardstick':>16} {'figure':>9} {'asked':>9}   command"


def rates(what: str, ours: Sequence[float], theirs: Sequence[float], asked: float, command: str) -> Row:
    """Rates (per second, one of each a round): the median of the ratios round by round, so that drift cancels."""
    ratio = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return Row(
        what,
        f"{median(ours):.0f}/s",
        f"{median(theirs):.0f}/s",
        f"{ratio:.2f}",
        f">= {asked:.2f}",
        ratio >= asked,
        command,
    )


def costs(what: str, ours: Sequence[float], theirs: Sequence[float], asked: float, command: str) -> Row:
    """Rates again, but the figure is how many times as much one of ours costs."""
    ratio = median(other / mine for mine, other in zip(ours, theirs, strict=True))
    return Row(
        what,
        f"{median(ours):.0f}/s",
        f"{median(theirs):.0f}/s",
        f"{ratio:.2f}",
        f"<= {asked:.2f}",
        ratio <= asked,
        command,
    )


def at_least(what: str, value: float, asked: float, command: str) -> Row:
    return Row(what, f"{value:.0f}/s", "", f"{value:.0f}", f">= {asked:.0f}", value >= asked, command)


def at_most(what: str, value: float, asked: float, unit: str, command: str) -> Row:
    return Row(what, f"{value:.1f} {unit}", "", f"{value:.1f}", f"<= {asked:g}", value <= asked, command)
