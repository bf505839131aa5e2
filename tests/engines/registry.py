"""A container registry on loopback."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engines import dies_with_us, missing

START_SECONDS = 30.0

CONFIG = """\
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {directory}/images}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


USER, PASSWORD = "user", "secret"
# One line of an htpasswd file: USER with the bcrypt of PASSWORD.
HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@contextmanager
def running_registry(directory: Path, *, login: bool = False) -> Iterator[str]:
    """Yields its address, 127.0.0.1:PORT. With `login` it shows nothing to who is not USER."""
    if shutil.which("docker-registry") is None:
        missing("A container registry", "apt-get install docker-registry, or run scripts/provision as root")
    port = free_port()
    config = directory / "registry.yml"
    text = CONFIG.format(directory=directory, port=port)
    if login:
        (directory / "htpasswd").write_text(HTPASSWD)
        text += f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\n"
    config.write_text(text)
    with (directory / "registry.log").open("wb") as output:
        process = subprocess.Popen(
            [*dies_with_us(), "docker-registry", "serve", str(config)], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            assert process.poll() is None, (directory / "registry.log").read_text()
            assert time.monotonic() < deadline, "the registry does not answer"
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
