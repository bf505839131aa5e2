"""What an agent must know after its own restart beyond the containers' labels: who it is, whose it is, how long its lease
holds, and why it ended what it ended.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cloudai_agent.lease import Lease
from cloudai_agent.reconcile import Cause, Ordered

log = logging.getLogger("cloudai.agent")


@dataclass(slots=True)
class Memory:
    """Who the worker is stands in `agent-<worker_id>.json` of the data directory and survives a machine that loses power.

    The rest, in `lease-<worker_id>.json`, is written at every heartbeat and every stop. It is not waited for until it
    is on disk, since a slow disk would hold up the stops; what may be lost with the machine is of little use after that.
    """

    path: Path
    identity: str
    cluster_id: str | None = None
    grace_seconds: float = 10.0
    lease: Lease = field(default_factory=Lease)
    ordered: dict[str, Ordered] = field(default_factory=dict)

    @property
    def lease_path(self) -> Path:
        return self.path.with_name(self.path.name.replace("agent-", "lease-", 1))

    def joins(self, cluster_id: str) -> None:
        """Take down whose worker it is."""
        if cluster_id != self.cluster_id:
            self.cluster_id = cluster_id
            self._try(self.introduce)

    def save(self) -> None:
        """Write what changed."""
        self._try(self._save)

    def _try(self, write: Callable[[], None]) -> None:
        """Where the disk is full the agent goes on with the older file: its lease only ends sooner."""
        try:
            write()
        except OSError as error:
            log.warning("%s cannot be written: %s", self.path, error)

    def introduce(self) -> None:
        """Write who the worker is, on disk before this returns. Raises OSError."""
        _replace(self.path, {"identity": self.identity, "cluster_id": self.cluster_id}, durable=True)

    def _save(self) -> None:
        value = {
            "boot": _boot(),  # the start of the machine that the lease counts in
            "grace_seconds": self.grace_seconds,
            "lease": asdict(self.lease),
            "ordered": {run_id: asdict(ordered) for run_id, ordered in self.ordered.items()},
        }
        _replace(self.lease_path, value, durable=False)


def recall(directory: Path, worker_id: str) -> Memory:
    """The memory of this worker, or that of a new one. Raises ValueError where who it is cannot be read."""
    path = directory / f"agent-{worker_id}.json"
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        memory = Memory(path, secrets.token_hex(16))
        memory.introduce()
        return memory
    try:
        value = json.loads(path.read_text())
        memory = Memory(path, value["identity"], value["cluster_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to join as a new worker") from error
    _recall_lease(memory)
    return memory


def _recall_lease(memory: Memory) -> None:
    path = memory.lease_path
    try:
        value = json.loads(path.read_text())
        lease = Lease(**value["lease"])
        # After a restart of the machine its clock began anew, and nothing that it ran is alive.
        memory.lease = lease if value["boot"] == _boot() else Lease(lease.seconds)
        memory.grace_seconds = value["grace_seconds"]
        memory.ordered = {
            run_id: Ordered(Cause(ordered["cause"]), ordered["at"]) for run_id, ordered in value["ordered"].items()
        }
    except FileNotFoundError:
        pass  # it never joined
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); why containers were stopped before is not known", path, error)


def _replace(path: Path, value: dict[str, Any], *, durable: bool) -> None:
    """Replace a file as a whole, so that a crash of this process leaves the old one or the new one.

    `durable`: so does a crash of the machine. Raises OSError.
    """
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        json.dump(value, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{os.uname().nodename}"
