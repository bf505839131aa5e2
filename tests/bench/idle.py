"""How long an idle system takes from a POST until `docker create` is sent to the engine."""

from __future__ import annotations

import time
from statistics import median

from tests.bench.containers import docker_cluster
from tests.bench.table import Row, at_most
from tests.engines.dockerd import PrivateDocker
from tests.engines.dockerproxy import DockerProxy
from tests.engines.images import build_busybox

TASKS = 30
WARMING = 3


def latency() -> list[Row]:
    waits = []
    with PrivateDocker() as engine:
        image = build_busybox(engine.host)
        with DockerProxy(engine.host) as proxy, docker_cluster(proxy.host) as cluster:
            for number in range(WARMING + TASKS):
                sent = time.monotonic()
                task_id = cluster.submit(image, "true")
                cluster.until(task_id, "completed")
                if number >= WARMING:
                    waits.append(1000 * (proxy.creates[-1] - sent))
    return [at_most("idle: POST to `docker create`, median", median(waits), 25, "ms", "make bench ARGS=idle")]
