"""What a server part takes on this machine before it starts: its data directory, its port, its token. Each is refused in
one sentence that says what to change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cloudai.keepalive import KEEPALIVE
from cloudai.settings import Settings

LOCAL_TOKEN = "agent.token"


class StartRefused(click.ClickException):
    """A part cannot start here; the message says what to change."""

    exit_code = 2


@contextmanager
def held_data_dir(settings: Settings, role: str) -> Iterator[Path]:
    """The data directory, made where missing, held by this process for `role` (such as `up`, `agent worker-1`).

    The lock is the kernel's: it goes with the process, however that dies.
    """
    directory = make_dir(settings.data_dir)
    try:
        lock = os.open(directory / f"{role.replace(' ', '-')}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(directory, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartRefused(
                f"the data directory {directory} is in use by {_holder(lock, role)}; "
                "stop that one, or choose another with --data-dir"
            ) from None
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise unusable(directory, error) from None
        yield directory
    finally:
        os.close(lock)


def make_dir(path: Path) -> Path:
    """A data directory that exists, readable by this user only when it is new."""
    directory = path.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileExistsError:
        raise StartRefused(f"data directory {directory}: this is a file; choose another with --data-dir") from None
    except OSError as error:
        raise unusable(directory, error) from None
    return directory


def unusable(directory: Path, error: OSError) -> StartRefused:
    return StartRefused(f"data directory {directory}: {error.strerror}; choose another with --data-dir")


def _holder(lock: int, role: str) -> str:
    pid = os.pread(lock, 32, 0).decode(errors="replace").strip()
    return f"another `cloudai {role}`" + (f" (process {pid})" if pid else "")


def listen(settings: Settings) -> socket.socket:
    """The API's listening socket; `port` 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartRefused(f"cannot listen on {settings.host}: {error.strerror}; choose another with --host") from None
    except UnicodeError:  # for a..b or a label of 64 letters no resolver is even asked
        raise StartRefused(
            f"cannot listen on {settings.host}: no host has such a name; choose another with --host"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, option, value in KEEPALIVE:  # who follows a log says nothing; what is accepted has them, too
            listener.setsockopt(level, option, value)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartRefused(
            f"cannot listen on {settings.host} port {settings.port}: {os.strerror(error.errno or 0)}; "
            "choose another with --port (0 takes a free one) or --host"
        ) from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """Where the API is reached from this machine; an address that means "all" becomes loopback."""
    port = listener.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def new_token() -> str:
    return secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    """What the store keeps of a join token."""
    return hashlib.sha256(token.encode()).digest()


def local_token(directory: Path) -> str | None:
    """The token of the worker that runs beside its API; None before one was made."""
    try:
        return read_token(directory / LOCAL_TOKEN)
    except FileNotFoundError:
        return None


def new_local_token(directory: Path) -> str:
    """Another one from now on, readable by this user only."""
    path = directory / LOCAL_TOKEN
    token = new_token()
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    return token


def read_token(path: Path) -> str:
    """The join token in a file. Raises FileNotFoundError, or StartRefused where the file holds none."""
    token = path.read_bytes().decode("ascii", "replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise StartRefused(f"{path} holds no join token; make one with `cloudai token create > {path}`")
    return token
