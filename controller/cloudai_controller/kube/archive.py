"""What is kept of an attempt before its Pod goes: its log. Its exit code and times are in the Task's status by then."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp

from cloudai.errors import CloudAIError
from cloudai.resources import Run
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.logs import archive_body
from cloudai.store.kube.pods import CONTAINER

LONGEST_LOG = 2 * 1024 * 1024  # bytes read of one attempt
LARGEST_KEPT = 700 * 1024  # bytes compressed: an object of Kubernetes holds a mebibyte, in base64
FOLLOW_SECONDS = 3900.0  # a grace of an hour, and then some

Json = dict[str, Any]
log = logging.getLogger("cloudai.operator")


class Archive:
    """Logs of the Pods of `namespace`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._followed: dict[str, asyncio.Task[bytes | None]] = {}

    def follow(self, run: Run) -> None:
        """The Pod is about to be ended: read its log to the end from now on, since the kubelet drops it soon after."""
        if run.started_at is not None and run.run_id not in self._followed:
            self._followed[run.run_id] = asyncio.ensure_future(self._read(run.run_id, follow=True))

    async def keep(self, run: Run, task: Json) -> None:
        """Keep the log of an attempt that has ended. Raises when it cannot be read now but may be later."""
        data: bytes | None = None
        following = self._followed.pop(run.run_id, None)
        if following is not None:
            data = await following
        if data is None and run.started_at is not None:
            data = await self._read(run.run_id, follow=False)
        if not data:
            return
        body = archive_body(run.run_id, task, data)
        while len(body["binaryData"]["log.zlib"]) > LARGEST_KEPT * 4 // 3:
            data = _cut(data, len(data) // 2)
            body = archive_body(run.run_id, task, data)
        try:
            await self._api.create(f"/api/v1/namespaces/{self._namespace}/configmaps", body)
        except ApiError as error:
            if error.status != 409:
                raise

    def forget(self, run_id: str) -> None:
        """Nobody will ask for its log."""
        following = self._followed.pop(run_id, None)
        if following is not None:
            following.cancel()

    async def _read(self, run_id: str, *, follow: bool) -> bytes | None:
        """None where there is no log any more."""
        path = f"/api/v1/namespaces/{self._namespace}/pods/{run_id}/log"
        query: dict[str, str | int] = {"container": CONTAINER, "limitBytes": LONGEST_LOG + 1}
        data = bytearray()
        try:
            async with asyncio.timeout(FOLLOW_SECONDS if follow else 30):
                async with self._api.stream(path, **query, **({"follow": "true"} if follow else {})) as stream:
                    async for piece in stream.iter_any():
                        data += piece
        except ApiError as error:
            if error.status in (400, 404):
                return None
            raise
        except (CloudAIError, aiohttp.ClientError, OSError, TimeoutError) as error:
            if not data:
                raise
            log.info("the log of %s broke off: %s", run_id, error)
        return _cut(bytes(data), LONGEST_LOG) if len(data) > LONGEST_LOG else bytes(data)


def _cut(data: bytes, length: int) -> bytes:
    return data[:length] + f"\n[cloudai: the log was cut at {length} bytes]\n".encode()
