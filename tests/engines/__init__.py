"""The real systems that tests need, started by the tests where none is there."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip a test whose engine is not there, saying how to get it; where nothing may be skipped (CI=true), fail it."""
    text = f"{what} is missing: {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(text)
    pytest.skip(text)


def dies_with_us(by: str = "KILL") -> list[str]:
    """The words before a command that gets this signal when the tests end without a chance to clear up."""
    return ["setpriv", "--pdeathsig", by] if shutil.which("setpriv") else []
