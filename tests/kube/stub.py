"""A stand-in for the API server, where it is to say what a real one says seldom."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from cloudai.settings import Settings
from cloudai.store.kube.api import Api, connect

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What a kubelet answers, with 200, of the log of `t-1` that it has not any more, and at the end of one it cannot follow.
_FILE = b"/var/log/pods/here_t-1_0f7cbf29/task/0.log"
NO_LOG = [
    b"unable to retrieve container logs for containerd://" + b"0" * 64,
    b'failed to try resolving symlinks in path "%s": lstat %s: no such file or directory' % (_FILE, _FILE),
    b'failed to open log file "%s": open %s: no such file or directory' % (_FILE, _FILE),
    b"container status is nil",
]
BEHIND = [
    b"container status is nil",
    b"fsnotify: queue or buffer overflow",
    b"failed to get parse function: unsupported log format: x",
    b"failed to create fsnotify watcher: too many open files",
    b'failed to watch directory "/var/log/pods/here_t-1_0f7cbf29/task": no space left on device',
    b'failed to read log file "%s": input/output error' % _FILE,
    b'rpc error: code = NotFound desc = an error occurred when try to find container "%s": not found' % (b"0" * 64),
]


@contextlib.asynccontextmanager
async def api_of(handle: Handler, directory: Path) -> AsyncIterator[Api]:
    """Requests that `handle` answers, whatever they are."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    config = directory / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://{host}:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    head = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}]}
    config.write_text(json.dumps(head | {"clusters": [cluster], "contexts": [context]}))
    api = await connect(Settings(kubeconfig=config))
    try:
        yield api
    finally:
        await api.close()
        await runner.cleanup()


def refused(status: int, reason: str, of: str = "") -> web.Response:
    """A refusal in Kubernetes' own words, of what kind of thing."""
    document = {"kind": "Status", "reason": reason, "code": status, "message": reason, "details": {"kind": of}}
    return web.json_response(document, status=status)
