from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from cloudai.api.convert import byte_count, gib, instant, milli, units, wished_gib
from cloudai.documents import milliseconds
from cloudai.resources import GIB

amounts = st.integers(0, 2**50)


@given(st.integers(0, 10**8))
def test_cores_come_back_as_the_thousandths_they_were(thousandths: int) -> None:
    assert milli(units(thousandths)) == thousandths


@given(amounts)
def test_gib_come_back_as_the_bytes_they_were(amount: int) -> None:
    assert byte_count(gib(amount)) == amount
    assert byte_count(wished_gib(amount)) == amount
    assert round(wished_gib(amount) * GIB) == amount


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_a_client_reads_the_short_number_that_it_sent(number: int, digits: int) -> None:
    sent = number / 10**digits
    assert wished_gib(byte_count(sent)) == sent


@given(st.floats(min_value=1e-300, max_value=1e-12))
def test_more_than_nothing_never_becomes_nothing(little: float) -> None:
    assert milli(little) == 1
    assert byte_count(little) == 1


@given(amounts, amounts)
def test_available_and_allocated_memory_are_the_total_to_the_last_digit(total: int, allocated: int) -> None:
    allocated = min(allocated, total)
    assert gib(total - allocated) + gib(allocated) == gib(total)


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_available_and_allocated_cores_are_the_total_to_the_last_digit(total: int, allocated: int) -> None:
    allocated = min(allocated, total)
    shown = [Decimal(str(units(amount))) for amount in (total - allocated, allocated, total)]
    assert shown[0] + shown[1] == shown[2]


@given(st.integers(0, 4_000_000_000_000))
def test_times_have_the_documented_form_in_whole_seconds(ms: int) -> None:
    assert milliseconds(instant(ms)) == ms // 1000 * 1000


def test_the_documented_time() -> None:
    assert instant(1_763_289_000_999) == "2025-11-16T10:30:00Z"
