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
    """One run's log. All but `_read` belongs to the event loop; `send(offset, data)` gives bytes to the connection."""

    def __init__(self, runtime: Runtime, run_id: str, stored: int, limit: int, changed: Callable[[], None]) -> None:
        self.run_id = run_id
        self._runtime = runtime
        self._limit = limit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()  # from byte `stored` of the log
        self._stored = stored
        self._sent = stored
        self._read_to = stored
        self._room = threading.Semaphore(0)
        self._free = WINDOW
        self._wanted = 0
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
        return self.ended and not self._buffer

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
        """Hand bytes over once there is room; False when nobody wants them any more. In the reader's thread."""
        for start in range(0, len(data), WINDOW // 4):
            piece = data[start : start + WINDOW // 4]
            self._tell(lambda piece=piece: self._take(piece))  # type: ignore[misc]
            self._room.acquire()
            if self._closed:
                return False
        return True

    def _tell(self, work: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # the loop has ended
            self._closed = True
            self._room.release()

    def _take(self, piece: bytes) -> None:
        self._buffer += piece
        self._read_to += len(piece)
        self._wanted += 1
        self._let_in()
        if len(self._buffer) - (self._sent - self._stored) >= LOG_CHUNK:
            self._ship()
        elif self._flush is None:
            self._flush = self._loop.call_later(FLUSH_SECONDS, self._ship)

    def _let_in(self) -> None:
        """Let the reader go on while what waits is within the window."""
        while self._wanted and len(self._buffer) < WINDOW:
            self._wanted -= 1
            self._room.release()

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
            self._let_in()
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
        self._room.release()
