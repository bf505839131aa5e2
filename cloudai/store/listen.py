"""How a process on PostgreSQL learns of the commits of others: LISTEN, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import psycopg

from cloudai.store.postgres import listening_connection
from cloudai.store.signals import REPAIR_SECONDS

log = logging.getLogger("cloudai.store")


class PostgresListener:
    """LISTENs in a thread of its own, and connects again when the connection is lost."""

    def __init__(self, url: str, changed: Callable[[], None]) -> None:
        self._url = url
        self._changed = changed
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
                    self._tell()  # whatever was told while nobody listened
                    while not self._stopping.is_set():
                        for _ in connection.notifies(timeout=0.5, stop_after=1):
                            self._tell()
            except psycopg.Error as error:
                log.warning("lost the database's notifications, connecting again: %s", str(error).strip())
                self._stopping.wait(REPAIR_SECONDS)

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed)
        except RuntimeError:
            self._stopping.set()  # the event loop has ended
