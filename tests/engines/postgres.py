"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary directory, on a loopback port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import psycopg

from tests.engines import dies_with_us, missing

HOW = "apt-get install postgresql, or run scripts/provision as root"
START_SECONDS = 60.0
USERS = ("postgres", "nobody")  # the server refuses to run as root


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs, the newest version's."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(installed[-1]) if installed else shutil.which(name)
    if found is None:
        missing("PostgreSQL", HOW)
    return found


class Postgres:
    """A context that holds a running server; it may be stopped, killed and started again."""

    def __init__(self, *options: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        self._options = options
        self._as: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            user = next(name for name in USERS if name in {entry.pw_name for entry in pwd.getpwall()})
            shutil.chown(self.directory, user)
            self._as = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": ()}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._run(
            program("initdb"), "--pgdata", f"{self.directory}/data", "--auth=trust", "--username=cloudai", "--no-sync"
        )

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as)

    def start(self) -> None:
        """Returns once it answers."""
        place = self.directory
        command = [*dies_with_us("INT"), program("postgres"), "-D", f"{place}/data", "-p", str(self.port)]
        command += ["-k", str(place), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", *self._options]
        with (place / "log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,  # Ctrl-C ends it by its fixture
                **self._as,
            )
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run([program("pg_isready"), "-q", "-h", str(place), "-p", str(self.port)]).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{(place / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends every connection at once and shuts down in order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_SECONDS)
            self._process = None

    def pause(self) -> None:
        """All its processes keep their connections and answer nobody."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # a connection's own process, whose connection has ended
                process.suspend()

    def go_on(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(int((self.directory / "data/postmaster.pid").read_text().split()[0]))
        return [first, *first.children()]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://cloudai@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """The URL of a new, empty database."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)
