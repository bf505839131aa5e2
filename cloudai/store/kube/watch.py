"""List and watch: every object of a collection, kept up to date through breaks, slow servers and expired versions.

A break costs a list: what changed meanwhile is told as changes, what vanished as deleted.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Set
from typing import Protocol

import aiohttp
import orjson

from cloudai.errors import CloudAIError
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.task_resource import Json

WATCH_SECONDS = 300  # the server ends a watch after this; the next one goes on from there
SILENCE = 90.0  # seconds that a watch may say nothing: bookmarks come about every minute
LONGEST_PAUSE = 10.0
MOST_FAULTS = 5  # one after the other
STEADY_SECONDS = 5.0  # a watch that lasted so long was none that ends at once
LONGEST_LINE = 8 * 1024 * 1024
ODD = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError)  # what reading an odd object may raise
Key = tuple[str, str]

log = logging.getLogger("cloudai.kubernetes")


class Follower(Protocol):
    """Who keeps what is told. An object that cannot be understood may raise: it is skipped, and the rest goes on."""

    def changed(self, resource: Json) -> None: ...

    def deleted(self, resource: Json) -> None: ...

    def only(self, keys: Set[Key], version: int) -> None:
        """At `version` there were these and no others: what else was known by then is gone."""
        ...


class _Expired(Exception):
    """The version is too old, or the server does not make sense: list again."""


async def follow(api: Api, path: str, follower: Follower, listed: Callable[[], None], **query: str) -> None:
    """Tell `follower` for ever of what `query` selects; calls `listed` after each whole list. Raises what is no fault of the
    server's only where lists do not make it good.
    """
    version: str | None = None
    failures = faults = 0
    while True:
        before = version
        began = asyncio.get_running_loop().time()
        try:
            if version is None:
                version = await _listed(api, path, follower, query)
                listed()
            version = await _watched(api, path, follower, version, query)
        except _Expired:
            version = None
        except ApiError as error:
            log.warning("%s cannot be watched: %s", path, error)
            version = None
        except ODD as error:
            log.warning("%s: what the server says makes no sense, so all is listed again: %r", path, error)
            version = None
        except (CloudAIError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("the watch of %s broke off and is taken up again: %s", path, error)
        except Exception:  # a fault of ours: what is known grows old unless somebody goes on following
            faults += 1
            if faults == MOST_FAULTS:
                raise
            log.exception("%s is listed again", path)
            version = None
        else:
            faults = 0
        # Whatever brings nothing new is not asked for without pause, whether it failed or ended at once.
        lasted = asyncio.get_running_loop().time() - began > STEADY_SECONDS
        failures = 0 if lasted or (before is not None and version not in (before, None)) else failures + 1
        await asyncio.sleep(min(LONGEST_PAUSE, 0.02 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))


async def _listed(api: Api, path: str, follower: Follower, query: Mapping[str, str]) -> str:
    """Tell of every object, a page at a time; returns the version of the list."""
    keys: set[Key] = set()
    version = "0"
    async for objects, listed in api.pages(path, **query):
        version = listed
        for resource in objects:
            keys.add(key_of(resource))
            _tell(follower.changed, resource)
    follower.only(keys, int(version))
    return version


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
        async with api.stream(path, **asked) as stream:
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
            _tell(follower.changed, resource)
        case "DELETED":
            _tell(follower.deleted, resource)
        case "BOOKMARK":
            pass
        case _:
            raise _Expired
    return version


def _tell(told: Callable[[Json], None], resource: Json) -> None:
    """One odd object, which anybody may have made, does not keep us from all others."""
    try:
        told(resource)
    except ODD as error:
        log.warning("%s is not understood and left out: %r", key_of(resource), error)


def key_of(resource: Json) -> Key:
    """Namespace (empty where there is none) and name."""
    return resource["metadata"].get("namespace", ""), resource["metadata"]["name"]


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Raises TimeoutError after a silence: of a connection that is half there nothing else tells."""
    rest = b""
    while True:
        async with asyncio.timeout(SILENCE):
            piece = await stream.readany()
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE:
            raise _Expired
