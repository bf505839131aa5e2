"""What is kept of an attempt before its Pod goes: its log. Its exit code and times are in the Task's status by then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import aiohttp

from cloudai.errors import CloudAIError, unavailable
from cloudai.resources import Run
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.logs import LONGEST, READ_SECONDS, archive_body, kubelet_words, log_path
from cloudai.store.kube.pods import CONTAINER
from cloudai.store.kube.task_resource import Json
from cloudai_controller.kube.state import SeenPod

LARGEST_KEPT = 700 * 1024  # bytes compressed: an object of Kubernetes holds a mebibyte, in base64
FOLLOW_SECONDS = 3900.0  # a grace of an hour, and then some

MOST_FOLLOWED = 64  # at once; of others what the kubelet has not dropped yet is read after their end
END_SECONDS = 10.0  # how long after a Pod's end what follows its log may take to end, too
BROKEN = b"\n[cloudai: the log may go on: its end could not be read]\n"


class _Read(NamedTuple):
    """`whole`: up to the end that the log has."""

    data: bytes
    whole: bool


class _Following(NamedTuple):
    """`heard`: what it has brought so far."""

    pod: SeenPod
    heard: bytearray
    reading: asyncio.Task[_Read]


class Archive:
    """Logs of the Pods of `namespace`. `is_known`: whether that very Pod is there still."""

    def __init__(self, api: Api, namespace: str, is_known: Callable[[SeenPod], bool]) -> None:
        self._api = api
        self._namespace = namespace
        self._is_known = is_known
        self._followed: dict[str, _Following] = {}  # by the Pod's uid

    def follow(self, pod: SeenPod) -> None:
        """The Pod is about to be ended: read its log to the end from now on, since the kubelet drops it soon after."""
        if pod.run.started_at is None or pod.uid in self._followed:
            return
        for one in [one.pod for one in self._followed.values() if not self._is_known(one.pod)]:
            self.forget(one)
        if len(self._followed) < MOST_FOLLOWED:
            heard = bytearray()
            reading = asyncio.ensure_future(self._read_on(pod.run.run_id, heard))
            self._followed[pod.uid] = _Following(pod, heard, reading)

    async def keep(self, pod: SeenPod, task: Json, is_last: Callable[[Exception], bool] = lambda _: False) -> None:
        """Keep the log of an attempt that has ended. Raises ApiError and `unavailable` when it cannot be read or kept now;
        what following has brought is there until the Pod is forgotten. `is_last`: whether, after that, what can be read is
        better than nothing.
        """
        read = await self._followed_to_the_end(pod)
        if pod.run.started_at is not None:
            # What was followed ends like a whole one where the kubelet went away meanwhile: the API server does not tell.
            again = await self._read_again(pod.run.run_id, is_last, followed=read)
            if len(again.data) >= len(read.data):
                read = again
            elif not again.whole:
                read = read._replace(whole=False)
        if not read.data:
            return
        data = read.data if read.whole else read.data + BROKEN
        body = await asyncio.to_thread(_body, pod.run, task, data)
        try:
            await self._api.create(f"/api/v1/namespaces/{self._namespace}/configmaps", body)
        except ApiError as error:
            if not error.already_exists:  # a quota's conflict is a 409, too
                raise

    async def _read_again(self, run_id: str, is_last: Callable[[Exception], bool], followed: _Read) -> _Read:
        try:
            again = await self._read(run_id, READ_SECONDS, bytearray())
        except (ApiError, CloudAIError) as error:
            if not is_last(error) or not (followed.data or followed.whole):
                raise
            return _Read(b"", False)
        if not again.whole:
            broken = unavailable(f"the log of {run_id} broke off after {len(again.data)} bytes")
            if not is_last(broken):
                raise broken
        return again

    def forget(self, pod: SeenPod) -> None:
        """Nobody will ask for its log any more."""
        following = self._followed.pop(pod.uid, None)
        if following is not None:
            following.reading.cancel()

    async def _followed_to_the_end(self, pod: SeenPod) -> _Read:
        """What following has brought; its end comes at once after the container's, or never."""
        if pod.uid not in self._followed:
            return _Read(b"", False)
        following = self._followed[pod.uid]
        await asyncio.wait([following.reading], timeout=END_SECONDS)
        done = following.reading.done() and not following.reading.cancelled()
        return following.reading.result() if done else _log(pod.run.run_id, following.heard, whole=False, follows=True)

    async def _read_on(self, run_id: str, heard: bytearray) -> _Read:
        """What cannot be followed is read after its end."""
        try:
            return await self._read(run_id, FOLLOW_SECONDS, heard, follow="true")
        except (ApiError, CloudAIError):
            return _Read(b"", False)
        finally:
            heard.clear()  # what is returned is enough

    async def _read(self, run_id: str, seconds: float, data: bytearray, **query: str) -> _Read:
        """The log, taken into `data`; nothing where there is none any more. Raises ApiError, or `unavailable` where not a byte
        came in time.
        """
        asked: dict[str, str | int] = {"container": CONTAINER, "limitBytes": LONGEST + 1, **query}
        whole = True
        try:
            path = log_path(self._namespace, run_id)
            async with asyncio.timeout(seconds), self._api.stream(path, **asked) as stream:
                async for piece in stream.iter_any():
                    data += piece
        except ApiError as error:
            if error.status not in (400, 404) or is_of_kubelet(error):
                raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if not data:
                raise unavailable(f"the log of {run_id} broke off: {error or type(error).__name__}") from None
            whole = False
        return _log(run_id, data, whole, follows="follow" in query)


def is_of_kubelet(error: Exception) -> bool:
    """Whether the node says that there is no such Pod. One that has only just started does not know its own yet."""
    return isinstance(error, ApiError) and error.status == 404 and error.details.get("kind") == "pods/log"


def _log(run_id: str, data: bytearray, whole: bool, follows: bool) -> _Read:
    """Without what the kubelet says at its end; where it says that alone, it has no log."""
    words = kubelet_words(data, run_id, follows=follows)
    log = bytes(data).removesuffix(words)
    return _Read(_shortened(log, LONGEST) if len(log) > LONGEST else log, whole and not (words and log))


def _body(run: Run, task: Json, data: bytes) -> Json:
    """Takes its time: not for the event loop."""
    body = archive_body(run, task, data)
    while len(body["binaryData"]["log.zlib"]) > LARGEST_KEPT * 4 // 3:
        data = _shortened(data, len(data) // 2)
        body = archive_body(run, task, data)
    return body


def _shortened(data: bytes, length: int) -> bytes:
    return data[:length] + f"\n[cloudai: the log was cut at {length} bytes]\n".encode()
