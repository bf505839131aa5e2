"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary directory, on a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psutil
import psycopg

from tests.engines import missing

HOW = "apt-get install postgresql, or run scripts/provision as root"
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
        self._as: list[str] = []
        if os.geteuid() == 0:
            user = next(name for name in USERS if name in {entry.pw_name for entry in pwd.getpwall()})
            shutil.chown(self.directory, user)
            self._as = ["runuser", "-u", user, "--"]
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
        subprocess.run([*self._as, *command], check=True, capture_output=True, cwd="/")

    def _control(self, *words: str) -> None:
        self._run(program("pg_ctl"), "--pgdata", f"{self.directory}/data", "--wait", *words)

    def start(self) -> None:
        options = (
            f"-p {self.port} -k {self.directory} -c listen_addresses=127.0.0.1 -c fsync=off {' '.join(self._options)}"
        )
        self._control("--log", f"{self.directory}/log", "-o", options, "start")

    def stop(self) -> None:
        """Ends every connection at once and shuts down in order."""
        status = subprocess.run(
            [*self._as, program("pg_ctl"), "--pgdata", f"{self.directory}/data", "status"], capture_output=True, cwd="/"
        )
        if status.returncode == 0:
            self._control("--mode=fast", "stop")

    def pause(self) -> None:
        """All its processes keep their connections and answer nobody."""
        for process in self._processes():
            process.suspend()

    def go_on(self) -> None:
        for process in self._processes():
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
