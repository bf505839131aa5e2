"""Scenarios in tests/controller/plans: read them as a description of what the controller does.

CLOUDAI_TEST_UPDATE=1 writes the plans anew; review the difference like documentation.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.controller.scenario import DASHES, played

PLANS = sorted((Path(__file__).parent / "plans").glob("*.txt"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plan_is_as_written(path: Path) -> None:
    text = path.read_text()
    scenario = text.partition(DASHES)[0]
    whole = f"{scenario}{DASHES}\n{played(scenario)}"
    if os.environ.get("CLOUDAI_TEST_UPDATE") == "1":
        path.write_text(whole)
    assert path.read_text() == whole


def test_there_are_plans() -> None:
    assert len(PLANS) >= 15
