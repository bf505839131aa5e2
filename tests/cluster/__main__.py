"""`make cluster`, `make cluster-load` and `make cluster-down`: a Kubernetes to try things on."""

from __future__ import annotations

import sys

from tests.cluster.binaries import Missing, cache, programs
from tests.cluster.cluster import Cluster, saved, start
from tests.cluster.images import load, load_busybox

DIRECTORY = cache() / "running"


def main(command: str) -> None:
    running = saved(DIRECTORY)
    if command == "down":
        if running is not None:
            running.stop()
        print("cluster: none is running" if running is None else "cluster: ended")
        return
    if command == "load":
        if running is None:
            raise Missing("none is running: make cluster")
        if sys.stdin.isatty():
            raise Missing("nothing to load: docker save IMAGE | make cluster-load")
        print(load(running, sys.stdin.buffer.read()), end="")
        return
    cluster = running if running is not None and running.ready else _started()
    print(f"cluster: running; end it with `make cluster-down`\n\n  export KUBECONFIG={cluster.kubeconfig}")
    print(f"  export PATH={programs()['kubectl'].parent}:{programs()['helm'].parent}:$PATH")


def _started() -> Cluster:
    cluster = start(DIRECTORY, programs(), dies_with_us=False)
    load_busybox(cluster)
    return cluster


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (Missing, RuntimeError, TimeoutError) as error:
        sys.exit(f"cluster: {error}")
