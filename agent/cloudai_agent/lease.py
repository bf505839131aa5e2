"""The worker's lease, counted from when the last acknowledged heartbeat was *sent*: whatever the network did to the answer,
the server has counted from no earlier than that.

Times are seconds of the clock that goes on while the machine sleeps, so a worker that was suspended knows it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Lease:
    """`seconds` None: the server never gives a worker up. `renewed_at` None: there never was a lease."""

    seconds: float | None = None
    renewed_at: float | None = None

    def renew(self, sent_at: float) -> None:
        if self.renewed_at is None or sent_at > self.renewed_at:
            self.renewed_at = sent_at

    def ends_at(self) -> float | None:
        if self.seconds is None or self.renewed_at is None:
            return None
        return self.renewed_at + self.seconds

    def over(self, now: float) -> bool:
        """True when the server may count this worker's runs as lost."""
        ends_at = self.ends_at()
        return ends_at is not None and now >= ends_at


def clock() -> float:
    """Seconds since the machine started, suspended time included where the system tells it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
