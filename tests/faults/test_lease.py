"""At most one live attempt: a worker that is cut off stops its containers before they start elsewhere."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Place
from tests.e2e.witness import Witness
from tests.engines.proxy import Proxy

LEASE = {"CLOUDAI_LEASE_SECONDS": "4"}


@pytest.mark.timeout(240)
def test_a_worker_cut_off_for_longer_than_the_lease_has_stopped_before_the_next_attempt_starts(
    make_cluster: MakeCluster, place: Place
) -> None:
    cluster = make_cluster(place, **LEASE)
    cluster.api()
    cluster.controller()
    with Proxy(cluster.port) as proxy, Witness() as witness:
        cluster.agent("worker-1", server=f"http://127.0.0.1:{proxy.port}")
        # It ignores TERM, so only the kill after the grace ends it.
        command = f"trap '' TERM; while true; do {witness.say('alive')}; sleep 0.1; done"
        task_id = cluster.submit(place.image, command)
        eventually("the first attempt runs", lambda: witness.times(task_id, 1))
        cluster.agent("worker-2")
        proxy.cut()
        eventually("the second attempt runs", lambda: witness.times(task_id, 2))
        assert max(witness.times(task_id, 1)) < min(witness.times(task_id, 2))
        task = cluster.until(task_id, "running")
        assert (task["attempt"], task["worker_id"]) == (2, "worker-2")
        proxy.mend()
        eventually("worker-1 is back", lambda: cluster.worker("worker-1")["is_active"])
        eventually("the first container is gone", lambda: f"{task_id}-1" not in place.running(cluster))
        cluster.cancel(task_id)
        cluster.until(task_id, "cancelled")
