"""An attempt's log: from its Pod while that is there, from the archive that the operator keeps once it is not.

Kubernetes cannot read a log from an offset, so what lies before it is read and dropped; whoever follows a log costs one
stream, which is kept in a file of this process while somebody reads on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import aiohttp

from cloudai.errors import CloudAIError, unavailable
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.pods import CONTAINER
from cloudai.store.protocol import LogSlice

IDLE_SECONDS = 30.0  # a stream that nobody has read from for this long is ended
log = logging.getLogger("cloudai.kubernetes")

Json = dict[str, Any]


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


class PodLogs:
    """Reads of `namespace`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._spools: dict[str, _Spool] = {}

    async def close(self) -> None:
        for spool in list(self._spools.values()):
            await spool.close()

    async def read(self, run_id: str, offset: int, limit: int, *, ended: bool) -> LogSlice:
        """Raises Absent. `ended`: no byte will follow what is there."""
        spool = self._spools.get(run_id)
        if spool is not None and not spool.failed:
            return spool.read(offset, limit)
        try:
            return await self._from_pod(run_id, offset, limit, ended)
        except ApiError as error:
            if error.status not in (400, 404, 500):
                raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unavailable(f"the log broke off: {error or type(error).__name__}") from None
        if not ended:
            return LogSlice(b"", 0, 0, False)  # the container has not started
        return _cut(await self._archived(run_id), offset, limit)

    async def _from_pod(self, run_id: str, offset: int, limit: int, ended: bool) -> LogSlice:
        data, seen = bytearray(), 0
        async with self._api.stream(self._path(run_id), container=CONTAINER) as stream:
            async for piece in stream.iter_any():
                start = max(0, offset - seen)
                data += piece[start : start + limit - len(data)]
                seen += len(piece)
        return LogSlice(bytes(data), min(offset, seen), seen, ended)

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
            spool = self._spools[run_id] = _Spool(self._api, self._path(run_id), lambda: self._spools.pop(run_id, None))
        await spool.wait(beyond, timeout)

    def _path(self, run_id: str) -> str:
        return f"/api/v1/namespaces/{self._namespace}/pods/{run_id}/log"


def _cut(data: bytes, offset: int, limit: int) -> LogSlice:
    return LogSlice(data[offset : offset + limit], min(offset, len(data)), len(data), True)


class _Spool:
    """One followed log, on disk; ends itself when nobody reads it or nothing follows."""

    def __init__(self, api: Api, path: str, gone: Callable[[], object]) -> None:
        self._file = tempfile.TemporaryFile(prefix="cloudai-log-")  # noqa: SIM115 - closed when the stream ends
        self._end = 0
        self._more = asyncio.Event()
        self._read_at = asyncio.get_running_loop().time()
        self._gone = gone
        self.failed = False
        self._task = asyncio.ensure_future(self._follow(api, path))

    async def _follow(self, api: Api, path: str) -> None:
        try:
            async with api.stream(path, container=CONTAINER, follow="true") as stream:
                async for piece in stream.iter_any():
                    self._file.seek(0, 2)
                    self._file.write(piece)
                    self._end += len(piece)
                    self._wake()
                    if asyncio.get_running_loop().time() - self._read_at > IDLE_SECONDS:
                        break
        except (ApiError, CloudAIError, aiohttp.ClientError, OSError, TimeoutError) as error:
            log.debug("a followed log broke off: %s", error)
        finally:
            self.failed = True  # whoever reads on reads the whole log anew
            self._gone()
            self._wake()
            self._file.close()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def read(self, offset: int, limit: int) -> LogSlice:
        self._read_at = asyncio.get_running_loop().time()
        self._file.seek(min(offset, self._end))
        return LogSlice(self._file.read(limit), min(offset, self._end), self._end, False)

    async def wait(self, beyond: int, timeout: float) -> None:
        self._read_at = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._end <= beyond and not self.failed:
                    await self._more.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
