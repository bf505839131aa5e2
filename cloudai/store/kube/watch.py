"""List and watch: every object of a collection, kept up to date through breaks, slow servers and expired versions.

A break costs a list: what changed meanwhile is told as changes, what vanished as deleted.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import aiohttp
import orjson

from cloudai.errors import CloudAIError
from cloudai.store.kube.api import Api, ApiError

Json = dict[str, Any]

WATCH_SECONDS = 300  # the server ends a watch after this; the next one goes on from there
SILENCE = 30.0  # seconds beyond WATCH_SECONDS that an unfinished watch may be silent
LONGEST_PAUSE = 10.0
LONGEST_LINE = 8 * 1024 * 1024

log = logging.getLogger("cloudai.kubernetes")


class Follower(Protocol):
    """Who keeps what is told. Nothing is told twice at once."""

    def listed(self, objects: Sequence[Json]) -> None:
        """All there are; whatever else was known is gone."""
        ...

    def changed(self, resource: Json) -> None: ...

    def deleted(self, resource: Json) -> None: ...


class _Expired(Exception):
    """The version is too old, or the server does not make sense: list again."""


async def follow(api: Api, path: str, follower: Follower, listed: Callable[[], None], **query: str) -> None:
    """Tell `follower` for ever; calls `listed` after each whole list."""
    version: str | None = None
    failures = 0
    while True:
        try:
            if version is None:
                objects, version = await api.list_all(path, **query)
                follower.listed(objects)
                listed()
                failures = 0
            before = version
            version = await _watched(api, path, follower, version, query)
            failures = 0 if version != before else failures
        except _Expired:
            version = None
        except ApiError as error:
            failures += 1
            log.warning("%s cannot be watched: %s", path, error)
            version = None
        except (CloudAIError, aiohttp.ClientError, TimeoutError, OSError) as error:
            failures += 1
            log.info("the watch of %s broke off and is taken up again: %s", path, error)
        # Also a server that ends each watch at once is not asked without pause.
        await asyncio.sleep(min(LONGEST_PAUSE, 0.02 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))


async def _watched(api: Api, path: str, follower: Follower, version: str, query: Mapping[str, str]) -> str:
    """Follow one watch to its end; returns the version to go on from."""
    asked: dict[str, str | int] = {
        **query,
        "watch": "true",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": WATCH_SECONDS,
    }
    try:
        async with asyncio.timeout(WATCH_SECONDS + SILENCE), api.stream(path, **asked) as stream:
            async for line in _lines(stream):
                version = _told(follower, line) or version
    except ApiError as error:
        if error.status == 410:
            raise _Expired from None
        raise
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        log.info("the watch of %s broke off and is taken up again: %s", path, error or type(error).__name__)
    return version


def _told(follower: Follower, line: bytes) -> str:
    """Pass one event on; returns its version."""
    try:
        event = orjson.loads(line)
        kind, resource = event["type"], event["object"]
        version = str(resource["metadata"]["resourceVersion"]) if kind != "ERROR" else ""
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise _Expired from None
    match kind:
        case "ADDED" | "MODIFIED":
            follower.changed(resource)
        case "DELETED":
            follower.deleted(resource)
        case "BOOKMARK":
            pass
        case _:
            raise _Expired
    return version


async def _lines(stream: aiohttp.StreamReader) -> Any:
    rest = b""
    async for piece in stream.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE:
            raise _Expired
