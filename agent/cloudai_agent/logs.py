"""Logs on their way to the server: a thread a container reads, the event loop ships, the server acknowledges.

At most WINDOW bytes of a run are under way or waiting; the reader stands still until some are acknowledged. Whatever was
not acknowledged is sent again after a reconnect, from the offset that the server has.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable

from cloudai.wire import LOG_CHUNK
from cloudai_agent.runtime import EngineDown, Runtime

log = logging.getLogger("cloudai.agent")

WINDOW = 1024 * 1024
PIECE = WINDOW // 4  # the most that waits for the event loop to take it
FLUSH_SECONDS = 0.05  # how long small pieces wait for company
RESUME_SECONDS = 1.0  # until a log whose reading broke off is read on


def cut_marker(limit: int) -> bytes:
    """What stands where a log was cut."""
    return f"\n[cloudai: the log was cut at {limit} bytes]\n".encode()


class Cut:
    """Keeps the first `limit` bytes of a stream and puts a marker after them; the same for any way the stream is split.

    Made for the stream from `offset` of what it gives out; `reads_from` is where the source must be read from.
    """

    def __init__(self, limit: int, offset: int) -> None:
        self._room = max(0, limit - offset)
        self._marker = cut_marker(limit)[max(0, offset - limit) :]
        self.full = offset > limit  # the marker was begun: what it stands for is known to exist
        self.reads_from = min(offset, limit)

    def take(self, piece: bytes) -> bytes:
        """What is given out for a piece; once `full`, the stream has ended."""
        if self.full:
            return b""
        kept, self._room = piece[: self._room], max(0, self._room - len(piece))
        if len(kept) == len(piece):
            return kept
        self.full = True
        return kept + self._marker

    def rest(self) -> bytes:
        """What is left to give out where an earlier stream broke off inside the marker."""
        return self._marker if self.full else b""


class Shipment:
    """One run's log. All but `_read` and `_give` belongs to the event loop; `send(offset, data)` gives bytes to the
    connection.
    """

    def __init__(self, runtime: Runtime, run_id: str, stored: int, limit: int, changed: Callable[[], None]) -> None:
        self.run_id = run_id
        self._runtime = runtime
        self._limit = limit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()  # from byte `stored` of the log
        self._stored = stored
        self._sent = stored
        self._handover = threading.Condition()  # between the reader and the loop: for the next two
        self._given = bytearray()  # read and not taken yet
        self._read_to = stored
        self._asked = False  # the loop was asked to take it
        self._closed = False
        self.ended = False  # every byte was read
        self._cut = False  # it ended at the longest that is kept
        self._expected: deque[int] = deque()  # where the pieces under way end, in the order of their acknowledgements
        self._rewind = False  # a piece did not arrive: once nothing is under way, send again
        self._flush: asyncio.TimerHandle | None = None
        self._send: Callable[[int, bytes], None] | None = None
        self._start()

    @property
    def stored(self) -> int:
        """How many bytes the server is known to have."""
        return self._stored

    @property
    def complete(self) -> bool:
        """The log has ended and the server has all of it."""
        return self.ended and not self._buffer and not self._given

    # -- reading

    def _start(self) -> None:
        name = f"log-{self.run_id}"
        threading.Thread(target=self._read, args=(self._read_to,), name=name, daemon=True).start()

    def reopen(self) -> None:
        """Read on where the log seemed to have ended but its container runs: an engine that restarts ends what it sends."""
        if self.ended and not self._cut and not self._closed:
            self.ended = False
            self._start()

    def _read(self, offset: int) -> None:
        cut = Cut(self._limit, offset)
        try:
            if not cut.full:
                for piece in self._runtime.read_log(self.run_id, cut.reads_from):
                    if not self._give(cut.take(piece)) or cut.full:
                        break
            else:
                self._give(cut.rest())
        except EngineDown:
            self._tell(self._broke_off)
        except Exception:
            log.exception("the log of %s cannot be read, trying again", self.run_id, extra={"run_id": self.run_id})
            self._tell(self._broke_off)
        else:
            self._tell(lambda: self._end(cut.full))

    def _give(self, data: bytes) -> bool:
        """Hand bytes over once there is room; False when nobody wants them any more. In the reader's thread.

        What comes while the loop is busy is taken at once: a log of many short lines costs no turn of the loop for each.
        """
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            with self._handover:
                self._handover.wait_for(lambda: len(self._given) < PIECE or self._closed)
                if self._closed:
                    return False
                self._given += piece
                self._read_to += len(piece)
                ask, self._asked = not self._asked, True
            if ask:
                self._tell(self._take)
        return True

    def _tell(self, work: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # the loop has ended
            self._closed = True

    def _take(self) -> None:
        """Take what was read while what waits is within the window."""
        if not self._asked or len(self._buffer) >= WINDOW:
            return  # the latter until some is acknowledged
        with self._handover:
            self._buffer += self._given
            self._given.clear()
            self._asked = False
            self._handover.notify()
        if len(self._buffer) - (self._sent - self._stored) >= LOG_CHUNK:
            self._ship()
        elif self._flush is None:
            self._flush = self._loop.call_later(FLUSH_SECONDS, self._ship)

    def _end(self, cut: bool) -> None:
        self.ended, self._cut = True, cut
        self._ship()
        self._changed()

    def _broke_off(self) -> None:
        self._loop.call_later(RESUME_SECONDS, lambda: None if self._closed else self._start())

    # -- shipping

    def connected(self, send: Callable[[int, bytes], None], stored: int) -> None:
        """There is a connection, and the server has `stored` bytes: send what it lacks."""
        self._send = send
        self._expected.clear()
        self._rewind = False
        self._advance(stored)
        self._sent = self._stored
        self._ship()

    def disconnected(self) -> None:
        self._send = None

    def acknowledged(self, end: int) -> None:
        """The answer to a piece: the server has the first `end` bytes. Less than to the end of that piece leaves a gap."""
        self._advance(end)
        if self._expected and end < self._expected.popleft() and end == self._stored:
            self._rewind = True
        if self._rewind and not self._expected:
            self._rewind = False
            self._sent = self._stored
            self._ship()

    def _advance(self, end: int) -> None:
        if end > self._stored:
            del self._buffer[: end - self._stored]
            self._stored = end
            self._sent = max(self._sent, end)
            if self._asked:
                self._loop.call_soon(self._take)
        if self.complete:
            self._changed()

    def _ship(self) -> None:
        if self._flush:
            self._flush.cancel()
            self._flush = None
        if self._send is None or self._closed or self._rewind:
            return
        while (start := self._sent - self._stored) < len(self._buffer):
            piece = bytes(self._buffer[start : start + LOG_CHUNK])
            self._send(self._sent, piece)
            self._sent += len(piece)
            self._expected.append(self._sent)

    def close(self) -> None:
        """Let go; the reader ends when it next has something to give."""
        self._closed = True
        if self._flush:
            self._flush.cancel()
        with self._handover:
            self._handover.notify()
