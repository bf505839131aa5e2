"""`make cluster`, `make cluster-load` and `make cluster-down`: a Kubernetes to try things on."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cluster.binaries import Missing, cache, programs
from tests.cluster.cluster import Cluster, saved, start
from tests.cluster.images import load, load_busybox

DIRECTORY = cache() / "running"


def main(command: str) -> None:
    found = saved(DIRECTORY)
    if command == "down":
        if found is not None:
            found.stop()
        print("cluster: none is running" if found is None else "cluster: ended")
        return
    running = found if found is not None and found.alive() else None
    if command == "load":
        if running is None:
            raise Missing("none is running: make cluster")
        if sys.stdin.isatty():
            raise Missing("nothing to load: docker save IMAGE | make cluster-load")
        print(load(running, sys.stdin.buffer.read()), end="")
        return
    cluster = running if running is not None and running.ready else _started()
    print(f"cluster: running; end it with `make cluster-down`\n\n  export KUBECONFIG={cluster.kubeconfig}")
    own = Path(sys.executable).parent  # where cloudai is
    print(f"  export PATH={programs()['kubectl'].parent}:{programs()['helm'].parent}:{own}:$PATH")


def _started() -> Cluster:
    cluster = start(DIRECTORY, programs(), dies_with_us=False)
    load_busybox(cluster)
    return cluster


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (Missing, RuntimeError, TimeoutError) as error:
        sys.exit(f"cluster: {error}")
