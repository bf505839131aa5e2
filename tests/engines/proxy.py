"""A network that a test can cut: a TCP proxy on loopback, in threads of its own."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType


class Proxy:
    """Passes connections on to `target` (a loopback port). While cut, bytes go nowhere and nobody is told."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._left: int | None = None  # bytes from the target until the cut
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Proxy:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut(self) -> None:
        self._open.clear()

    def let_through(self, size: int) -> None:
        """Mended until the target has answered `size` bytes more, to all connections together; then cut."""
        self._left = size
        self._open.set()

    def mend(self) -> None:
        self._left = None
        self._open.set()

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                near, _ = self._listener.accept()
                self._spawn(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            ends = {near: far, far: near}
            while not self._ended.is_set():
                if not self._open.wait(0.05):
                    continue
                for ready in select.select(list(ends), [], [], 0.05)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    if ready is far:
                        self._count(len(data))
                    ends[ready].sendall(data)

    def _count(self, size: int) -> None:
        """What comes with the last byte before the cut still passes."""
        if self._left is not None:
            self._left -= size
            if self._left <= 0:
                self._left = None
                self.cut()
