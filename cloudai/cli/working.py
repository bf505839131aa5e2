"""The agent as a part: a worker's name, its lock on this machine, its runtime."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cloudai.cli.place import StartRefused, held_data_dir
from cloudai.cli.runtimes import Choice, choose
from cloudai.settings import Settings
from cloudai_agent.loop import Agent


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """A worker of this machine that no other process serves. `settings` name it."""

    settings: Settings
    choice: Choice

    @property
    def name(self) -> str:
        assert self.settings.worker_id is not None
        return self.settings.worker_id

    def agent(self, token: str, server: str | None = None) -> Agent:
        """The agent, joining `server` (default: that of the settings)."""
        settings = self.settings.model_copy(update={"server": server}) if server else self.settings
        try:
            return Agent(settings, token, self.choice.runtime)
        except ValueError as error:  # its memory
            raise StartRefused(str(error)) from None


@contextmanager
def held_worker(settings: Settings) -> Iterator[LocalWorker]:
    """Take the worker's name and runtime on this machine; raises StartRefused where another process has it."""
    name = settings.worker_id or worker_name(socket.gethostname())
    with held_data_dir(settings, f"agent {name}") as directory:
        choice = choose(settings, directory, name)
        try:
            yield LocalWorker(settings.model_copy(update={"worker_id": name}), choice)
        finally:
            choice.runtime.close()


def worker_name(host: str) -> str:
    """A host name as a worker's name: letters, digits, dots, dashes and underscores, at most 63."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host)[:63].strip("._-") or "worker"
