"""`make cluster` and `make cluster-down`: a Kubernetes to try things on."""

from __future__ import annotations

import sys

from tests.cluster.binaries import Missing, cache, programs
from tests.cluster.cluster import saved, start

DIRECTORY = cache() / "running"


def main(command: str) -> None:
    running = saved(DIRECTORY)
    if command == "down":
        if running is not None:
            running.stop()
        print("cluster: none is running" if running is None else "cluster: ended")
        return
    cluster = running or start(DIRECTORY, programs(), dies_with_us=False)
    print(f"cluster: running; end it with `make cluster-down`\n\n  export KUBECONFIG={cluster.kubeconfig}")
    print(f"  export PATH={programs()['kubectl'].parent}:{programs()['helm'].parent}:$PATH")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (Missing, RuntimeError, TimeoutError) as error:
        sys.exit(f"cluster: {error}")
