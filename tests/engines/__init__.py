"""The real systems that tests need, started by the tests where none is there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip a test whose engine is not there, saying how to get it; where nothing may be skipped (CI=true), fail it."""
    text = f"{what} is missing: {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(text)
    pytest.skip(text)
