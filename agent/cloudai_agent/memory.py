"""What an agent must know after its own restart beyond the containers' labels: who it is, whose it is, how long its lease
holds, and why it ended what it ended.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cloudai_agent.lease import Lease
from cloudai_agent.reconcile import Cause, Ordered

log = logging.getLogger("cloudai.agent")


@dataclass(slots=True)
class Memory:
    """Kept in `agent-<worker_id>.json` of the data directory. `boot` says which start of the machine the lease counts in."""

    path: Path
    identity: str
    cluster_id: str | None = None
    grace_seconds: float = 10.0
    lease: Lease = field(default_factory=Lease)
    ordered: dict[str, Ordered] = field(default_factory=dict)

    def save(self) -> None:
        """Write what changed. Where the disk is full the agent goes on with the older file: its lease only ends sooner."""
        try:
            self.write()
        except OSError as error:
            log.warning("%s cannot be written: %s", self.path, error)

    def write(self) -> None:
        """Replace the file as a whole, so that a crash leaves the old one or the new one. Raises OSError."""
        value = asdict(self) | {"boot": _boot()}
        del value["path"]
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.replace(self.path)


def recall(directory: Path, worker_id: str) -> Memory:
    """The memory of this worker, or that of a new one. Raises ValueError for a file that is none."""
    path = directory / f"agent-{worker_id}.json"
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        memory = Memory(path, secrets.token_hex(16))
        memory.write()
        return memory
    try:
        value = json.loads(path.read_text())
        same_boot = value.pop("boot") == _boot()
        lease = Lease(**value.pop("lease"))
        ordered = {run_id: Ordered(Cause(it["cause"]), it["at"]) for run_id, it in value.pop("ordered").items()}
        # After a restart of the machine its clock began anew, and nothing that it ran is alive.
        return Memory(path, lease=lease if same_boot else Lease(lease.seconds), ordered=ordered, **value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to join as a new worker") from error


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{os.uname().nodename}"
