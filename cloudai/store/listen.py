"""How a process on PostgreSQL learns of the commits of others: LISTEN, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import psycopg

from cloudai.store.postgres import listening_connection
from cloudai.store.signals import REPAIR_SECONDS, Signals

log = logging.getLogger("cloudai.store")


class PostgresListener:
    """LISTENs in a thread of its own, and connects again when the connection is lost.

    `own` gives the server's number of the session that this process commits in: what that one tells is known here.
    """

    def __init__(self, url: str, signals: Signals, own: Callable[[], int | None]) -> None:
        self._url = url
        self._signals = signals
        self._own = own
        self._stopping = threading.Event()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="store-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with listening_connection(self._url) as connection:
                    connection.execute("LISTEN cloudai")
                    connection.execute("LISTEN cloudai_log")
                    self._tell(self._signals.foreign)  # whatever was told while nobody listened
                    while not self._stopping.is_set():
                        for told in connection.notifies(timeout=0.5, stop_after=1):
                            self._heard(told)
            except psycopg.Error as error:
                log.warning("lost the database's notifications, connecting again: %s", str(error).strip())
                self._stopping.wait(REPAIR_SECONDS)

    def _heard(self, told: psycopg.Notify) -> None:
        if told.pid == self._own():
            return
        if told.channel == "cloudai_log":
            self._tell(self._signals.logged, [told.payload])
        else:
            self._tell(self._signals.foreign)

    def _tell(self, signal: Callable[..., None], *words: object) -> None:
        try:
            self._loop.call_soon_threadsafe(signal, *words)
        except RuntimeError:
            self._stopping.set()  # the event loop has ended
