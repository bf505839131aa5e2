"""An attempt's log: from its Pod while that is there, from the archive that the operator keeps once it is not.

Whoever follows a log costs one stream, and whoever reads one a download, however many pieces they read it in.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import AsyncGenerator
from math import inf
from typing import NamedTuple

import aiohttp

from cloudai.errors import unavailable
from cloudai.resources import Run
from cloudai.store.kube.api import Api, ApiError, as_unavailable
from cloudai.store.kube.pods import CONTAINER
from cloudai.store.kube.spool import Room, Spool, Unreadable
from cloudai.store.kube.task_resource import ATTEMPT_LABEL, GROUP, TASK_LABEL, Json
from cloudai.store.protocol import LogSlice

LONGEST = 2 * 1024 * 1024  # bytes kept of one attempt, and a line that says so
MOST_FOLLOWED = 128  # logs at once
MOST_BYTES = 768 * 1024 * 1024  # of all logs that are followed or read: the chart gives /tmp a gibibyte
READ_SECONDS = 60.0  # that reading all there is may take: of a kubelet that hangs nothing may ever come
END_SECONDS = 10.0  # how long after an attempt's end what follows its log may take to end, too
LOG_LABEL = f"{GROUP}/log"
# What the kubelet says, and answers 200: instead of a log, or at the end of one that it cannot read or follow any longer
# (`GetContainerLogs` and `ReadLogs` of Kubernetes). No line's end follows.
_INSTEAD = re.compile(
    rb"unable to retrieve container logs for [a-z-]+://[0-9a-f]{64}|container status is nil"
    rb'|failed to (?:try resolving symlinks in path|open log file) (?P<path>"/[^"\n]*"):[^\n]*'
)
_BEHIND = re.compile(rb'failed to get parse function:[^\n]*\Z|failed to read log file (?P<path>"/[^"\n]*"):[^\n]*\Z')
_BEHIND_FOLLOWED = re.compile(
    rb"(?:failed to (?:create fsnotify watcher|get parse function):|fsnotify:|rpc error: code = [A-Za-z]+ desc =)[^\n]*\Z"
    rb"|container status is nil\Z"
    rb'|failed to (?:watch directory|(?:read|open|reset seek in) log file) (?P<path>"/[^"\n]*"):[^\n]*\Z'
)
_LONGEST_WORDS = 2000


class Absent(Exception):
    """There is no such log now: the Pod is gone or has not started, the kubelet has it no more, the archive has none."""


class Log(NamedTuple):
    """An attempt's, by its Pod's name. `task_uid`: of the Task, since another one of that name has other logs."""

    run_id: str
    task_uid: str

    @property
    def kept_as(self) -> str:
        """The name of the ConfigMap that keeps it: never one that another Task has left behind."""
        return f"{self.run_id}-{self.task_uid[:8]}-log"


def archive_body(run: Run, task: Json, data: bytes) -> Json:
    """The ConfigMap that keeps a log. `task`: the metadata of its Task, which it goes with."""
    owner = {"apiVersion": task["apiVersion"], "kind": task["kind"], "name": task["name"], "uid": task["uid"]}
    labels = {LOG_LABEL: "true", TASK_LABEL: run.task_id, ATTEMPT_LABEL: str(run.attempt)}
    meta = {"name": Log(run.run_id, task["uid"]).kept_as, "ownerReferences": [owner], "labels": labels}
    packed = base64.b64encode(zlib.compress(data)).decode()
    head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
    return head | {"immutable": True, "binaryData": {"log.zlib": packed}}


def log_path(namespace: str, pod: str) -> str:
    """Where the API server gives a Pod's log."""
    return f"/api/v1/namespaces/{namespace}/pods/{pod}/log"


def kubelet_words(data: bytes | bytearray, pod: str, *, follows: bool, goes_on: bool = False) -> bytes:
    """The end of `data`, of the log of that Pod, where it is nothing of the log but something the kubelet says.

    `goes_on`: `data` is not from the beginning. What has a path is of the Pod whose name is in it.
    """
    last = bytes(data[-_LONGEST_WORDS:])
    last = last[last.rfind(b"\n") + 1 :]
    found = None if goes_on or len(last) < len(data) else _INSTEAD.fullmatch(last)
    found = found or (_BEHIND_FOLLOWED if follows else _BEHIND).search(last)
    if found is None or (found["path"] and f"_{pod}_".encode() not in found["path"]):
        return b""
    return found[0]


class PodLogs:
    """Reads of `namespace`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._spools: set[Spool] = set()
        self._followed: dict[Log, Spool] = {}
        self._copies: dict[Log, Spool] = {}  # whole, the one that was read longest ago first
        self._room = Room(MOST_BYTES, self._freed)

    async def close(self) -> None:
        for spool in list(self._spools):
            await spool.close()

    async def read(self, of: Log, offset: int, limit: int, *, ended: bool) -> LogSlice:
        """Raises Absent. `ended`: no byte will follow what is there."""
        spool = self._followed.get(of)
        if spool is not None and ended and not spool.over:
            await spool.wait(inf, END_SECONDS)
            if not spool.over:
                spool.drop()
        if spool is not None and not spool.dropped.is_set():
            has = offset < spool.end or (offset == spool.end and not spool.over)
            if spool.final or (has and not ended and not spool.old.is_set() and spool.end >= spool.known):
                return _slice(spool, offset, limit)
        copy = self._copies.get(of)
        if copy is None or not (copy.final if ended and offset else copy.take_place(offset)):
            copy = await self._copied(of, ended)  # whole: the kubelet cannot begin at an offset
        if (before := self._copies.pop(of, copy)) is not copy:
            copy.succeed(before)
        self._copies[of] = copy
        if spool is not None and not spool.dropped.is_set():
            spool.known = min(spool.known, copy.end)  # less, where the kubelet has begun a new file
            if max(offset, copy.end) < spool.end:
                return _slice(spool, offset, limit)  # what the kubelet or the archive has no more
        piece = _slice(copy, offset, limit)
        copy.keep_place(piece.offset + len(piece.data))
        return piece

    async def _copied(self, of: Log, ended: bool) -> Spool:
        """All that there is now."""
        try:
            return await self._whole(of, self._from_pod(of), ended)
        except Unreadable:
            pass
        except ApiError as error:
            if error.status == 500 and not ended:  # its node does not answer
                raise as_unavailable(error) from None
            if error.status not in (400, 404, 500):
                raise
        if not ended:
            raise Absent
        return await self._whole(of, self._from_archive(of), True)

    async def _whole(self, of: Log, source: AsyncGenerator[bytes, None], ended: bool) -> Spool:
        """`source`, to its end."""
        copy = self._open(of, source, 0, ended)
        try:
            await copy.wait(inf, READ_SECONDS)
            error = copy.error or (None if copy.over else TimeoutError())
            if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
                raise unavailable(f"the log broke off: {str(error) or type(error).__name__}")
            if error is not None:
                raise error
        except BaseException:
            copy.drop()
            raise
        return copy

    async def wait(self, of: Log, beyond: int) -> bool:
        """Return when the running attempt has written more than `beyond` bytes; False when no more is to be had of it soon, but
        for news of its Pod: what follows a log ends before that is known, or because its kubelet has restarted or cannot.
        """
        spool = self._followed.get(of)
        if spool is not None and spool.old.is_set():
            spool.drop()
            spool = None
        if spool is None:
            if len(self._followed) >= MOST_FOLLOWED:
                raise unavailable(f"{MOST_FOLLOWED} logs are followed already")
            spool = self._followed[of] = self._open(of, self._from_pod(of, follow="true"), beyond, False)
        await spool.wait(beyond, None)
        if spool.end <= beyond and not spool.stays:
            await spool.old.wait()
            return True
        return spool.end > beyond

    def _open(self, of: Log, source: AsyncGenerator[bytes, None], known: int, final: bool) -> Spool:
        def gone(spool: Spool) -> None:
            self._spools.discard(spool)
            for known in (self._followed, self._copies):
                if known.get(of) is spool:
                    del known[of]

        try:
            spool = Spool(source, self._room, gone, known, final)
        except OSError as error:
            raise unavailable(f"there is no place for a log: {error}") from None
        self._spools.add(spool)
        return spool

    def _freed(self) -> bool:
        spool = next((copy for copy in self._copies.values() if copy.is_for_later), None)
        if spool is not None:
            spool.drop()
        return spool is not None

    async def _from_pod(self, of: Log, **query: str) -> AsyncGenerator[bytes, None]:
        """A line that has not ended is held back: it may become the kubelet's words. Raises Unreadable at their place."""
        held, goes_on = b"", False
        async with self._api.stream(log_path(self._namespace, of.run_id), container=CONTAINER, **query) as stream:
            async for piece in stream.iter_any():
                piece = held + piece
                cut = max(piece.rfind(b"\n") + 1, len(piece) - _LONGEST_WORDS)
                held = piece[cut:]
                if cut:
                    goes_on = True
                    yield piece[:cut]
        words = kubelet_words(held, of.run_id, follows="follow" in query, goes_on=goes_on)
        if rest := held.removesuffix(words):
            yield rest
        if words:
            raise Unreadable(words.decode(errors="replace"))

    async def _from_archive(self, of: Log) -> AsyncGenerator[bytes, None]:
        try:
            kept = await self._api.get(f"/api/v1/namespaces/{self._namespace}/configmaps/{of.kept_as}")
        except ApiError as error:
            if error.status == 404:
                raise Absent from None
            raise
        # Whoever may write ConfigMaps there could have put anything under that name, of any size.
        try:
            packed = base64.b64decode(kept["binaryData"]["log.zlib"])
            data = zlib.decompressobj().decompress(packed, LONGEST + 1024)
        except (LookupError, TypeError, ValueError, zlib.error):
            raise Absent from None
        yield data


def _slice(spool: Spool, offset: int, limit: int) -> LogSlice:
    return LogSlice(spool.read(offset, limit), min(offset, spool.end), spool.end, spool.final)
