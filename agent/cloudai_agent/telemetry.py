"""How busy this machine is."""

from __future__ import annotations

import psutil


def usage() -> tuple[float, float]:
    """Percent of all cores since the last call, and percent of the memory in use."""
    return psutil.cpu_percent(), psutil.virtual_memory().percent
