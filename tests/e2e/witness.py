"""An eye that does not trust CloudAI: tasks tell it themselves that they run, over loopback, and it notes who and when."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections import Counter
from types import TracebackType
from typing import NamedTuple


class Sighting(NamedTuple):
    """What a container said of itself, and when it was heard (seconds of one monotonic clock)."""

    task_id: str
    attempt: int
    word: str
    at: float


class Witness:
    """Listens on a loopback port; `say(word)` is the shell command by which a task reports to it."""

    def __init__(self) -> None:
        self.sightings: list[Sighting] = []
        seen = self.sightings

        class Note(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line = self.rfile.readline().decode().split()
                if len(line) == 3:
                    seen.append(Sighting(line[0], int(line[1]), line[2], time.monotonic()))

        class Server(socketserver.ThreadingTCPServer):
            request_queue_size = 128
            daemon_threads = True
            allow_reuse_address = True

        self.server = Server(("127.0.0.1", 0), Note)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Witness:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def say(self, word: str) -> str:
        port = self.server.server_address[1]
        return f'echo "$CLOUDAI_TASK_ID $CLOUDAI_ATTEMPT {word}" | busybox nc -w 5 127.0.0.1 {port}'

    def count(self, word: str) -> Counter[str]:
        """How often each task said `word`."""
        return Counter(sighting.task_id for sighting in list(self.sightings) if sighting.word == word)

    def times(self, task_id: str, attempt: int) -> list[float]:
        return [seen.at for seen in list(self.sightings) if (seen.task_id, seen.attempt) == (task_id, attempt)]


class Gate:
    """Tasks wait at it until the test opens it: `wait` is the shell command that ends then."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.wait = f"busybox nc 127.0.0.1 {self._listener.getsockname()[1]} </dev/null 2>/dev/null"

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()

    def open(self) -> None:
        """For who waits and for who comes: connections end with the listener, and are refused from then on."""
        self._listener.close()
