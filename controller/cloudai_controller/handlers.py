"""What kopf is for: it follows Tasks, and each event puts a key into the queue. Nothing is decided here.

kopf's own handlers act on what an event says happened; ours look at what is. Its events may be late, doubled or lost: the
memory keeps the newer version, and the operator's slow list repairs the rest.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import kopf
import uvloop
from kopf._core.reactor import inventory

from cloudai.store.kube.api import PAGE, Api
from cloudai.store.kube.task_resource import GROUP, PLURAL, VERSION
from cloudai_controller.kube.facts import Facts

KEY_WORKERS = 100  # of kopf: they only pass keys on
# After which kopf forgets an object's worker: it takes in at most workers / idle objects a second, and what is new waits
# behind the first list.
IDLE_SECONDS = 0.02
AGAIN_SECONDS = 1.0  # after kopf has ended
END_SECONDS = 3.0  # that a task of kopf's may take to end, at least

log = logging.getLogger("cloudai.operator")


async def feed(facts: Facts, api: Api, namespace: str) -> None:
    """Tell `facts` of events until cancelled.

    kopf has a thread and an event loop of its own: it takes over the signals of the main one, and when it ends it waits
    for every task of its loop. It ends when a watch is answered with an error that it does not know; then everything is
    listed, since a new kopf is not told of what was deleted meanwhile.
    """
    while True:
        try:
            await _feed_once(facts, api, namespace)
        except Exception as error:  # noqa: BLE001 - whatever ended it
            log.warning("events broke off and are taken up again: %s", str(error) or type(error).__name__)
        await asyncio.sleep(AGAIN_SECONDS)
        await facts.list_tasks()


async def _feed_once(facts: Facts, api: Api, namespace: str) -> None:
    loop, stop = asyncio.get_running_loop(), threading.Event()
    running = loop.run_in_executor(None, lambda: uvloop.run(_follow(facts, api, namespace, loop, stop)))
    try:
        await asyncio.shield(running)
    finally:
        stop.set()
        await asyncio.gather(running, return_exceptions=True)


async def _follow(
    facts: Facts, api: Api, namespace: str, loop: asyncio.AbstractEventLoop, stop: threading.Event
) -> None:
    # What two of its tasks fail of at once is told of one by `feed`, and nobody asks for the other.
    asyncio.get_running_loop().set_exception_handler(lambda _, told: log.debug("kopf: %s", told.get("exception")))
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(api)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def task(event: Any, **_: Any) -> None:
        loop.call_soon_threadsafe(facts.task_told, event["type"], dict(event["object"]))

    logging.getLogger("kopf").setLevel(logging.CRITICAL)  # what ends it is told by `feed`, and lists by the facts
    insisting = asyncio.ensure_future(_insist())
    try:
        await kopf.operator(
            registry=registry,
            settings=settings(),
            memories=_NothingRemembered(),
            identity="cloudai",  # type: ignore[arg-type]  # kopf would ask for the name of a user, which an image need not have
            namespaces=[namespace],
            standalone=True,
            stop_flag=stop,
        )
    finally:
        insisting.cancel()
        stop.set()  # a thread of this loop waits for it, and the loop for that thread


async def _insist() -> None:
    """Cancel again what does not end: kopf cancels its tasks once and waits for ever, and its use of `asyncio.wait_for` may
    swallow that in Python 3.11. It leaves alone what was there before it.
    """
    ending: set[asyncio.Task[Any]] = set()
    while True:
        await asyncio.sleep(END_SECONDS)
        before, ending = ending, {task for task in asyncio.all_tasks() if task.cancelling()}
        for task in ending & before:
            task.cancel()


def settings() -> kopf.OperatorSettings:
    """For thousands of short-lived objects, and nothing written by kopf itself."""
    chosen = kopf.OperatorSettings()
    chosen.scanning.disabled = True
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.queueing.worker_limit = KEY_WORKERS
    chosen.queueing.idle_timeout = IDLE_SECONDS
    chosen.watching.chunk_size = PAGE
    chosen.networking.request_timeout = 30
    chosen.persistence.diffbase_storage = _NothingKept()
    return chosen


class _NothingKept(kopf.DiffBaseStorage):
    """Where kopf would keep what it handled last: nobody asks, and taking it down costs as much as all else it does."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NothingRemembered(inventory.ResourceMemories):
    """What kopf would remember of each object, as long as that is there, for handlers that none of ours is."""

    async def recall(self, raw_body: kopf.RawBody, **options: Any) -> inventory.ResourceMemory:
        return await super().recall(raw_body, **options | {"ephemeral": True})


async def connection(api: Api) -> kopf.ConnectionInfo:
    """The way that the operator's own requests take; only another name for TLS than the host's is nothing that kopf knows."""
    configuration = api.configuration
    scheme, _, token = (await api.credential() or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=scheme or None,
        token=token or None,
        proxy_url=configuration.proxy or None,
    )
