"""The agent's own endpoint: is it alive, can it start containers, its metrics. Served by a thread, so that it answers even
while the agent's loop is busy.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("cloudai.agent")


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: who connects and says nothing keeps nobody waiting."""

    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's, which looks this machine's name up and may wait for that
        self.server_name, self.server_port = "cloudai-agent", self.server_address[1]
        self.setup_environ()


class Health:
    """Serves `/healthz`, `/readyz` and `/metrics` on `port`, or on a free one where that is taken.

    `problem()` is None while the worker can start containers, else a sentence.
    """

    def __init__(self, port: int, problem: Callable[[], str | None]) -> None:
        self._problem = problem
        self._metrics = make_wsgi_app()
        self._server = _listen(port, self._answer)
        self.port = self._server.server_port

    def __enter__(self) -> Health:
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        problem = self._problem()
        match environ["PATH_INFO"]:
            case "/metrics":
                return list(self._metrics(environ, start))
            case "/healthz":
                status, text = "200 OK", "ok"
            case "/readyz":
                status, text = ("200 OK", "ready") if problem is None else ("503 Service Unavailable", problem)
            case _:
                status, text = "404 Not Found", "there are /healthz, /readyz and /metrics"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]


def _listen(port: int, app: Callable[..., Iterable[bytes]]) -> WSGIServer:
    try:
        return make_server("0.0.0.0", port, app, _Server, _Quiet)
    except OSError as error:
        server = make_server("0.0.0.0", 0, app, _Server, _Quiet)
        log.warning(
            "port %d cannot be had for the health endpoint (%s): using %d", port, error.strerror, server.server_port
        )
        return server


def local_address(server: str) -> str:
    """This machine's address on the way to the server; no packet is sent."""
    parts = urlsplit(server)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, _, _, _, target = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
