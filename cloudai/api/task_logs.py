"""`GET /api/tasks/{task_id}/logs`: the bytes of one attempt, from an offset, whole or followed to their end.

Bytes go out in pieces as the store gives them, so a log of any size costs a piece of memory. A client that goes away ends
it; a failure in the midst, or the API's own stop, breaks the connection, and the client takes up again at the byte it has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cloudai.api import validation
from cloudai.api.changes import Changes
from cloudai.api.models import LogQuery
from cloudai.api.places import Places
from cloudai.api.routing import Request
from cloudai.api.tasks import REPAIR, task_id_of
from cloudai.resources import Task
from cloudai.store.protocol import FacadeStore, LogSlice

PIECE = 256 * 1024  # bytes read and sent at once
QUIET = 15.0  # seconds of one wait for more
FOLLOWED = 100  # logs that one address may follow at once: each is looked at now and then, for as long as it pleases


class TaskLogs:
    """`followers`: None for as many as anybody likes."""

    def __init__(self, store: FacadeStore, changes: Changes, followers: Places | None) -> None:
        self._store = store
        self._changes = changes
        self._followers = followers

    async def get(self, request: Request) -> Response:
        task_id = task_id_of(request)
        query = validation.query(LogQuery, request.query)
        if query.follow and request.scope["method"] == "GET":
            async with contextlib.AsyncExitStack() as place:
                if self._followers is not None:
                    await place.enter_async_context(self._followers.taken(request.scope))
                stream = await self._followed(task_id, query)
                stream.place = place.pop_all()
                return stream
        first = await self._first(task_id, query.attempt, query)
        if query.follow:
            return _Stream(self._follow(task_id, query.attempt, query.limit, first), first)
        stop = first.end if query.limit is None else min(first.end, query.offset + query.limit)
        return _Stream(self._stored(task_id, query.attempt, first, stop), first, length=max(stop - first.offset, 0))

    async def _first(self, task_id: str, attempt: int | None, query: LogQuery) -> LogSlice:
        piece = PIECE if query.limit is None else min(query.limit, PIECE)
        return await self._store.read_log(task_id, attempt, query.offset, piece)

    async def _followed(self, task_id: str, query: LogQuery) -> _Stream:
        """From an attempt's log of now to its end."""
        task = await self._store.get_task(task_id)
        attempt = query.attempt or task.attempt or None
        if attempt is None:
            nothing = LogSlice(b"", query.offset, 0, False)
            return _Stream(self._from_placement(task_id, query), nothing, broken=self._changes.ended)
        first = await self._first(task_id, attempt, query)
        return _Stream(self._follow(task_id, attempt, query.limit, first), first, broken=self._changes.ended)

    async def _stored(self, task_id: str, attempt: int | None, first: LogSlice, stop: int) -> AsyncIterator[bytes]:
        """What was stored when the first piece was read, up to byte `stop`."""
        data, offset = first.data, first.offset
        while offset < stop and data:
            yield data
            offset += len(data)
            if offset < stop:
                data = (await self._store.read_log(task_id, attempt, offset, min(PIECE, stop - offset))).data

    async def _from_placement(self, task_id: str, query: LogQuery) -> AsyncIterator[bytes]:
        """The log of the first attempt, once there is one; nothing where the task ends without."""
        task = await self._placed(task_id)
        if task.attempt == 0:
            return
        first = await self._first(task_id, 1, query)
        async for data in self._follow(task_id, 1, query.limit, first):
            yield data

    async def _placed(self, task_id: str) -> Task:
        with self._changes.of_task(task_id) as changed:
            while True:
                changed.clear()
                task = await self._store.get_task(task_id)
                if task.attempt or task.status.terminal:
                    return task
                try:
                    async with asyncio.timeout(REPAIR):
                        await changed.wait()
                except TimeoutError:
                    continue

    async def _follow(
        self, task_id: str, attempt: int | None, limit: int | None, piece: LogSlice
    ) -> AsyncIterator[bytes]:
        left, offset = limit, piece.offset
        while True:
            if piece.data and piece.offset == offset:  # a log that was cut meanwhile is not sent again from its start
                yield piece.data
                offset += len(piece.data)
            left = None if left is None else left - len(piece.data)
            if left == 0 or (piece.complete and offset >= piece.end):
                return
            if offset >= piece.end:
                await self._store.wait_log(task_id, attempt, offset, QUIET)
            piece = await self._store.read_log(task_id, attempt, offset, PIECE if left is None else min(PIECE, left))


class _Stream(Response):
    """Sends `pieces` until they end or the client goes away. `length`: how many bytes they have, where that is known.

    `broken`: once it is set they are broken off, without what would tell the client that they are whole. `place` is given
    back at the end.
    """

    place: contextlib.AsyncExitStack | None = None

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        first: LogSlice,
        *,
        length: int | None = None,
        broken: asyncio.Event | None = None,
    ) -> None:
        self.status_code = 200
        self._pieces = pieces
        self._broken = broken
        self._head: list[tuple[bytes, bytes]] = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"x-content-type-options", b"nosniff"),  # a task's output is never a page
            (b"cache-control", b"no-store"),
            (b"x-log-offset", b"%d" % first.offset),
            (b"x-log-end", b"%d" % first.end),
            (b"x-log-complete", b"true" if first.complete else b"false"),
        ]
        if length is not None:
            self._head.append((b"content-length", b"%d" % length))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send, scope["method"] != "HEAD"))
        ends: list[asyncio.Future[Any]] = [asyncio.ensure_future(_gone(receive))]
        if self._broken is not None:
            ends.append(asyncio.ensure_future(self._broken.wait()))
        try:
            await asyncio.wait([sending, *ends], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for part in (sending, *ends):
                part.cancel()
            await asyncio.gather(sending, *ends, return_exceptions=True)
            if self.place is not None:
                await self.place.aclose()

    async def _send(self, send: Send, wanted: bool) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._head})
        if wanted:
            # So that a follower knows at once that it is connected, though nothing may come for long.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            async for data in self._pieces:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
