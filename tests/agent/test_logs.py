"""A log is cut at the same byte with the same words, however it is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudai_agent.logs import Cut, cut_marker


def shipped(log: bytes, limit: int, offset: int, size: int) -> bytes:
    """What a reader that begins at `offset` of the kept log gives out."""
    cut = Cut(limit, offset)
    if cut.full:
        return cut.rest()
    out = b""
    rest = log[cut.reads_from :]
    for start in range(0, len(rest), size):
        out += cut.take(rest[start : start + size])
    return out


@given(st.binary(max_size=200), st.integers(1, 250), st.integers(1, 50), st.data())
def test_reading_on_from_any_byte_gives_the_rest(log: bytes, limit: int, size: int, data: st.DataObject) -> None:
    whole = log if len(log) <= limit else log[:limit] + cut_marker(limit)
    offset = data.draw(st.integers(0, len(whole)))
    assert shipped(log, limit, offset, size) == whole[offset:]
