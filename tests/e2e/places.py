"""Where tasks run in an end-to-end test, seen without CloudAI: Docker's own list, the machine's own processes."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple, Protocol

import docker
import psutil
from docker.errors import APIError, NotFound
from docker.models.containers import Container

from tests.e2e.cluster import Cluster


class Body(NamedTuple):
    """What carries one attempt of a task: a container or the first of its processes. Number and start tell it from another
    of its name.
    """

    name: str  # <task_id>-<attempt>
    number: str  # the engine's id, or a pid
    started: str


class Place(Protocol):
    runtime: str
    image: str
    environment: dict[str, str]

    def running(self, cluster: Cluster) -> list[str]:
        """Names of what runs (or, in Docker, exists) for this cluster's tasks right now."""
        ...

    def alive(self, cluster: Cluster) -> list[Body]:
        """What runs for this cluster's tasks at this instant; what has ended and is only kept does not count."""
        ...

    def clear(self, cluster: Cluster) -> None:
        """End whatever a test left."""
        ...


class Docker:
    """A real engine. Containers use the host's network, so that they can tell a test on loopback that they started."""

    runtime = "docker"

    def __init__(self, host: str, image: str) -> None:
        self.image = image
        self.host = host
        self.client = docker.DockerClient(base_url=host, timeout=60)
        self.environment = {"DOCKER_HOST": host, "CLOUDAI_NETWORK": "host"}

    def containers(self, cluster: Cluster) -> list[Container]:
        """Every container of the cluster's tasks, ended ones too."""
        identity = cluster.http.get("/readyz").headers.get("x-cloudai-cluster", "")
        filters: dict[str, str | list[str] | bool] = {
            "label": f"cloudai.cluster={identity}" if identity else "cloudai.cluster"
        }
        return list(self.client.containers.list(all=True, filters=filters, ignore_removed=True))

    def running(self, cluster: Cluster) -> list[str]:
        return sorted(str(container.name) for container in self.containers(cluster))

    def alive(self, cluster: Cluster) -> list[Body]:
        found = [each for each in self.containers(cluster) if each.attrs["State"]["Running"]]
        return sorted(Body(str(each.name), str(each.id), each.attrs["State"]["StartedAt"]) for each in found)

    def clear(self, cluster: Cluster) -> None:
        for container in self.client.containers.list(
            all=True, filters={"label": "cloudai.cluster"}, ignore_removed=True
        ):
            with contextlib.suppress(NotFound, APIError):
                container.remove(force=True, v=True)
        self.client.close()


class Processes:
    """No engine: tasks are processes that carry their id in the environment."""

    runtime = "process"
    image = "none"

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def processes(self, cluster: Cluster) -> list[Body]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                workdir = environment.get("HOME", "")
                if "CLOUDAI_TASK_ID" in environment and workdir.startswith(str(cluster.directory)):
                    name = f"{environment['CLOUDAI_TASK_ID']}-{environment['CLOUDAI_ATTEMPT']}"
                    found.append(Body(name, str(process.pid), _start(process.pid)))
        return found

    def running(self, cluster: Cluster) -> list[str]:
        return sorted({body.name for body in self.processes(cluster)})

    def alive(self, cluster: Cluster) -> list[Body]:
        first: dict[str, Body] = {}
        for body in sorted(self.processes(cluster), key=lambda body: (int(body.started), int(body.number))):
            first.setdefault(body.name, body)  # the processes that it starts come and go
        return sorted(first.values())

    def clear(self, cluster: Cluster) -> None:
        for body in self.processes(cluster):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(body.number), signal.SIGKILL)


def _start(pid: int) -> str:
    """When a process began, in clock ticks since the boot."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
