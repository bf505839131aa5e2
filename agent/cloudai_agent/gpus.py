"""How many GPUs this machine has, as its NVIDIA driver says."""

from __future__ import annotations


def count() -> int:
    """The number of GPUs, 0 where there is no driver."""
    import pynvml  # only where it is asked: most workers have no GPU

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
