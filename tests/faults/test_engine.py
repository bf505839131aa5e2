"""The engine goes away and comes back: the worker says so, starts nothing meanwhile, and finds its containers again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import eventually
from tests.e2e.conftest import MakeCluster
from tests.e2e.places import Docker
from tests.e2e.witness import Witness
from tests.engines.dockerd import PrivateDocker
from tests.engines.images import build_busybox

pytestmark = pytest.mark.docker


@pytest.fixture
def engine() -> Iterator[PrivateDocker]:
    with PrivateDocker() as engine:
        yield engine


def test_a_killed_engine_comes_back_and_its_containers_end_once(
    engine: PrivateDocker, make_cluster: MakeCluster
) -> None:
    place = Docker(engine.host, build_busybox(engine.host))
    cluster = make_cluster(place)
    cluster.start_all()
    with Witness() as witness:
        task_id = cluster.submit(place.image, f"{witness.say('start')}; echo before; sleep 2; {witness.say('end')}")
        eventually("it started", lambda: witness.count("start")[task_id])
        engine.kill()
        eventually("the worker says so", lambda: not cluster.worker("worker-1")["is_active"])
        assert "Docker" in cluster.worker("worker-1")["problem"]
        waiting = cluster.submit(place.image, "true")
        engine.start()
        eventually("the worker is back", lambda: cluster.worker("worker-1")["is_active"])
        cluster.until(waiting, "completed")
        task = cluster.finished([task_id])[0]
    assert task["attempt"] == 1
    assert witness.count("start")[task_id] == 1
    assert cluster.logs(task_id).startswith("before\n")
    # The engine ends the containers that outlived it when it starts again; one that ended before is a success.
    assert task["status"] == ("completed" if task["exit_code"] == 0 else "failed")
    eventually("nothing is left", lambda: not place.running(cluster))
