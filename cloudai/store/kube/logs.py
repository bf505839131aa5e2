"""An attempt's log: from its Pod while that is there, from the archive that the operator keeps once it is not.

Whoever follows a log costs one stream, which is kept in a file of this process while somebody reads on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
import tempfile
import zlib
from collections.abc import Callable

import aiohttp

from cloudai.errors import CloudAIError, unavailable
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import CONTAINER
from cloudai.store.kube.task_resource import Json
from cloudai.store.protocol import LogSlice

IDLE_SECONDS = 30.0  # a stream that nobody has read from for this long is ended
LONGEST_SPOOL = 64 * 1024 * 1024  # bytes of a followed log that are kept; there it ends
MOST_SPOOLS = 128  # logs followed at once
READ_SECONDS = 60.0  # that reading all there is may take: of a kubelet that hangs nothing may ever come
CONTINUED_SECONDS = 5.0  # a log that was read from the start is kept for its reader's next pieces this long
# The kubelet's words, with which it answers 200, where the container was removed already.
_REMOVED = re.compile(rb"unable to retrieve container logs for [a-z-]+://[0-9a-f]{64}\s*")
log = logging.getLogger("cloudai.kubernetes")


class Absent(Exception):
    """There is no such log: the Pod is gone or has not started, the archive has none."""


def archive_body(run_id: str, task: Json, data: bytes) -> Json:
    """The ConfigMap that keeps a log. `task`: the metadata of its Task, which it goes with."""
    owner = {"apiVersion": task["apiVersion"], "kind": task["kind"], "name": task["name"], "uid": task["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{run_id}-log", "ownerReferences": [owner], "labels": {"cloudai.dev/log": "true"}},
        "immutable": True,
        "binaryData": {"log.zlib": base64.b64encode(zlib.compress(data)).decode()},
    }


def log_path(namespace: str, pod: str) -> str:
    """Where the API server gives a Pod's log."""
    return f"/api/v1/namespaces/{namespace}/pods/{pod}/log"


def is_removed(data: bytes | bytearray) -> bool:
    """Whether that is what the kubelet says of a log that it has no more."""
    return _REMOVED.fullmatch(data) is not None


class PodLogs:
    """Reads of `namespace`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._spools: dict[str, _Spool] = {}
        self._last = ("", b"", 0.0)

    async def close(self) -> None:
        for spool in list(self._spools.values()):
            await spool.close()

    async def read(self, run_id: str, offset: int, limit: int, *, ended: bool) -> LogSlice:
        """Raises Absent. `ended`: no byte will follow what is there."""
        spool = self._spools.get(run_id)
        if spool is not None and not spool.failed and offset <= spool.end:
            return spool.read(offset, limit)
        try:
            data = await self._whole(run_id, offset)
        except ApiError as error:
            if error.status not in (400, 404, 500):
                raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unavailable(f"the log broke off: {error or type(error).__name__}") from None
        else:
            if not (ended and is_removed(data)):
                return _slice(data, offset, limit, ended)
        if not ended:
            return LogSlice(b"", 0, 0, False)  # the container has not started
        return _slice(await self._archived(run_id), offset, limit, True)

    async def _whole(self, run_id: str, offset: int) -> bytes:
        """All that the kubelet has. It cannot begin at an offset, so who reads on piece by piece gets the same bytes."""
        now = asyncio.get_running_loop().time()
        name, data, read_at = self._last
        if name == run_id and 0 < offset < len(data) and now - read_at < CONTINUED_SECONDS:
            self._last = (name, data, now)
            return data
        path = log_path(self._namespace, run_id)
        async with asyncio.timeout(READ_SECONDS), self._api.stream(path, container=CONTAINER) as stream:
            data = await stream.read()
        self._last = (run_id, data, now)
        return data

    async def _archived(self, run_id: str) -> bytes:
        try:
            kept = await self._api.get(f"/api/v1/namespaces/{self._namespace}/configmaps/{run_id}-log")
        except ApiError as error:
            if error.status == 404:
                raise Absent from None
            raise
        return zlib.decompress(base64.b64decode(kept["binaryData"]["log.zlib"]))

    async def wait(self, run_id: str, beyond: int, timeout: float) -> None:
        """Return when the running attempt has written more than `beyond` bytes, or its log ends, or after `timeout`."""
        spool = self._spools.get(run_id)
        if spool is None or spool.failed:
            if len(self._spools) >= MOST_SPOOLS:
                raise unavailable(f"{MOST_SPOOLS} logs are followed already")
            spool = self._spools[run_id] = _Spool(
                self._api, log_path(self._namespace, run_id), lambda: self._spools.pop(run_id, None)
            )
        await spool.wait(beyond, timeout)


def _slice(data: bytes, offset: int, limit: int, ended: bool) -> LogSlice:
    return LogSlice(data[offset : offset + limit], min(offset, len(data)), len(data), ended)


class _Spool:
    """One followed log, on disk; ends itself when nobody reads it or nothing follows."""

    def __init__(self, api: Api, path: str, gone: Callable[[], object]) -> None:
        self._file = tempfile.TemporaryFile(prefix="cloudai-log-")  # noqa: SIM115 - closed when the stream ends
        self.end = 0
        self._more = asyncio.Event()
        self._read_at = asyncio.get_running_loop().time()
        self._gone = gone
        self.failed = False
        self._task = asyncio.ensure_future(self._follow(api, path))

    async def _follow(self, api: Api, path: str) -> None:
        try:
            async with api.stream(path, container=CONTAINER, follow="true") as stream:
                while self.end < LONGEST_SPOOL:
                    piece = await self._next(stream)
                    if not piece:
                        break
                    self._file.seek(0, 2)
                    self._file.write(piece)
                    self.end += len(piece)
                    self._wake()
        except (ApiError, CloudAIError, aiohttp.ClientError, OSError, TimeoutError) as error:
            log.debug("a followed log broke off: %s", error)
        finally:
            self.failed = True  # whoever reads on reads the whole log anew
            self._gone()
            self._wake()
            self._file.close()

    async def _next(self, stream: aiohttp.StreamReader) -> bytes:
        """What was written next; nothing at the end, or when nobody reads any more."""
        loop = asyncio.get_running_loop()
        while (left := self._read_at + IDLE_SECONDS - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    return await stream.readany()
        return b""

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def read(self, offset: int, limit: int) -> LogSlice:
        self._read_at = asyncio.get_running_loop().time()
        self._file.seek(offset)
        return LogSlice(self._file.read(limit), offset, self.end, False)

    async def wait(self, beyond: int, timeout: float) -> None:
        self._read_at = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.end <= beyond and not self.failed:
                    await self._more.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
