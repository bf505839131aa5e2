"""A log on its way: what comes in is kept in a file of this process while somebody reads it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Callable

from cloudai.errors import CloudAIError, unavailable

IDLE_SECONDS = 30.0  # what nobody has read from for this long goes
KEPT_SECONDS = 10.0  # what has ended is asked for anew after this,
AGAIN_SECONDS = 1.0  # and what broke off after this
LONGEST = 64 * 1024 * 1024  # bytes of one log; there it ends, and says so
log = logging.getLogger("cloudai.kubernetes")


class Unreadable(Exception):
    """Where a log should go on, its source says why it does not."""


class Room:
    """Bytes that all files together may have. `freed` gives up a file that is there for later, False where none is."""

    def __init__(self, size: int, freed: Callable[[], bool]) -> None:
        self._left = size
        self._freed = freed

    def take(self, count: int) -> None:
        """Raises `unavailable` where there is no more."""
        while self._left < count:
            if not self._freed():
                raise unavailable("too much of logs is read at once")
        self._left -= count

    def give(self, count: int) -> None:
        self._left += count


class Spool:
    """What `source` brings. It ends itself when nobody reads it.

    `over`: nothing more comes, since the source has ended or, as `error` says, broke off. `final`: no log goes on after it.
    `known`: how many bytes there are at least; with less it is not up to date.
    """

    def __init__(
        self, source: AsyncGenerator[bytes, None], room: Room, gone: Callable[[Spool], None], known: int, final: bool
    ) -> None:
        # Unbuffered, so that a full disk is noticed by who writes. `drop` closes it.
        self._file = tempfile.TemporaryFile(prefix="cloudai-log-", buffering=0)  # noqa: SIM115
        self._taken = 0
        self._room = room
        self._gone = gone
        self._more = asyncio.Event()
        self._readers = 0
        self._places: Counter[int] = Counter()  # where readers are, and how many
        self._read_at = asyncio.get_running_loop().time()
        self.end = 0
        self.over = False
        self.known = known
        self.final = final
        self.error: Exception | None = None
        self.old = asyncio.Event()  # it has been over for so long that its source may have more by now
        self.dropped = asyncio.Event()
        self._filling = asyncio.ensure_future(self._fill(source))
        self._living = asyncio.ensure_future(self._live())

    async def _live(self) -> None:
        while not self._filling.done() and (left := self._left(IDLE_SECONDS)) > 0:
            await asyncio.wait([self._filling], timeout=left)
        if self._filling.done():
            self.over = True
            self._wake()
            await asyncio.sleep(KEPT_SECONDS if self.stays else AGAIN_SECONDS)
            self.old.set()
            while (left := self._left(IDLE_SECONDS)) > 0:  # noqa: ASYNC110
                await asyncio.sleep(left)
        self.drop()

    async def _fill(self, source: AsyncGenerator[bytes, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for piece in source:
                    left = LONGEST - self.end
                    self._add(piece[:left])
                    if len(piece) > left:
                        self._add(f"\n[cloudai: the log was cut at {LONGEST} bytes]\n".encode())
                        self.final = True
                        return
        except Exception as error:  # noqa: BLE001 - told to whoever reads
            log.debug("a log broke off: %s", error)
            self.error = error

    def _add(self, piece: bytes) -> None:
        self._room.take(len(piece))
        self._taken += len(piece)
        self._file.seek(self.end)
        written = self._file.write(piece)
        self.end += written
        self._wake()
        if written < len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def _left(self, seconds: float) -> float:
        """Until nobody has read for so long."""
        return seconds if self._readers else self._read_at + seconds - asyncio.get_running_loop().time()

    @property
    def stays(self) -> bool:
        """Whether its end is one that its source would come to again, were it asked at once."""
        return self.error is None or isinstance(self.error, CloudAIError | Unreadable)

    @property
    def is_for_later(self) -> bool:
        """Whether it is over and nobody waits for it."""
        return self.over and not self._readers

    def read(self, offset: int, limit: int) -> bytes:
        """What is there."""
        self._read_at = asyncio.get_running_loop().time()
        self._file.seek(offset)
        return self._file.read(min(limit, max(0, self.end - offset)))

    def keep_place(self, offset: int) -> None:
        """A piece was read up to there, and its reader may come for the next one."""
        if offset < self.end:
            self._places[offset] += 1

    def take_place(self, offset: int) -> bool:
        """Whether somebody's place is there: who comes is that reader, and it is nobody's any more."""
        if offset not in self._places:
            return False
        self._places[offset] -= 1
        if not self._places[offset]:
            del self._places[offset]
        return True

    def succeed(self, before: Spool) -> None:
        """Whoever is in the midst of `before` goes on here, unless the log has begun anew."""
        if self.end >= before.end:
            self._places += before._places
        before.drop()

    async def wait(self, beyond: float, timeout: float | None) -> None:
        """Return when there are more than `beyond` bytes, or it is over, or after `timeout` seconds."""
        if self.over:
            return
        self._readers += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while self.end <= beyond and not self.over:
                        await self._more.wait()
        finally:
            self._readers -= 1
            self._read_at = asyncio.get_running_loop().time()

    def drop(self) -> None:
        """At once, whoever reads."""
        if self.dropped.is_set():
            return
        self.over = True
        self.old.set()
        self.dropped.set()
        self._wake()
        self._filling.cancel()
        self._living.cancel()
        self._file.close()
        self._room.give(self._taken)
        self._gone(self)

    async def close(self) -> None:
        """The same, and its end is waited for."""
        self.drop()
        await asyncio.gather(self._filling, self._living, return_exceptions=True)
