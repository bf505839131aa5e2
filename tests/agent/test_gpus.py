"""GPUs are counted where NVIDIA's driver is; elsewhere there are none and nothing fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cloudai_agent import gpus


def test_as_many_as_the_driver_lists() -> None:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        listed = ""
    assert gpus.count() == sum(line.startswith("GPU ") for line in listed.splitlines())


def test_counting_again_gives_the_same() -> None:
    assert gpus.count() == gpus.count()


def test_the_driver_is_not_looked_for_before_somebody_asks() -> None:
    program = "import sys, cloudai_agent.loop; sys.exit('pynvml' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
