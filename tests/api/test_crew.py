"""What is uncertain of a task over a store whose workers are none of ours: Kubernetes' nodes. What a look at ours costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from cloudai.api import crew
from cloudai.api.crew import Crew
from cloudai.api.explain import Waiting, explain_wish
from cloudai.api.lead import Lead
from cloudai.clock import now_ms
from cloudai.resources import GIB, NOTHING, Reason, Resources, Task, TaskSpec, TaskStatus, Worker, WorkerState
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore
from cloudai.store.sql import SqlStore

SPEC = TaskSpec(user_id="ann", image="busybox", command=None, resources=Resources(1000, GIB, 0, 0))
QUEUED = Task(task_id="task-1", spec=SPEC, status=TaskStatus.QUEUED, created_at=1, version=1)
RUNNING = replace(QUEUED, status=TaskStatus.RUNNING, attempt=1, worker_id="node", started_at=2)


class Nodes:
    """As much of a store over Kubernetes as the crew asks for: one node."""

    agents = None

    def __init__(self, heard_at: int, problem: str | None = None, silent: bool = False) -> None:
        self._node = Worker(
            worker_id="node",
            identity="uid",
            address="node:10250",
            capacity=Resources(8000, 16 * GIB, 0, 0),
            runtime="kubernetes",
            registered_at=0,
            last_heartbeat=heard_at,
            ready=problem is None,
            problem=problem,
            silent=silent,
        )

    async def list_workers(self) -> list[WorkerState]:
        return [WorkerState(worker=self._node, allocated=NOTHING, runs=1)]


async def told(nodes: Nodes, task: Task, problem: str | None = None) -> tuple[Reason, str] | None:
    store = cast(FacadeStore, cast(Any, nodes))
    lead = Lead(store)
    lead.known = problem
    [waiting] = await Crew(store, lead, Settings(data_dir=Path("none"))).why([task])
    return None if waiting is None else (waiting.reason, waiting.message)


async def test_a_node_that_is_silent_is_told_of_and_nothing_is_said_of_a_lease() -> None:
    waiting = await told(Nodes(now_ms() - 60_000, silent=True), RUNNING)
    assert waiting is not None
    assert waiting[0] is Reason.WORKER_INACTIVE
    assert "was last heard of 60 s ago" in waiting[1]
    assert "lease" not in waiting[1]


async def test_a_node_whose_clock_is_late_is_no_silent_one() -> None:
    assert await told(Nodes(now_ms() - 60_000), RUNNING) is None


@pytest.mark.parametrize("problem", [None, "The node is cordoned"])
async def test_a_node_that_only_takes_no_more_tasks_is_no_worry_to_those_it_has(problem: str | None) -> None:
    assert await told(Nodes(now_ms(), problem), RUNNING) is None


async def test_that_nobody_leads_is_told_unless_the_cluster_has_said_more() -> None:
    nodes = Nodes(now_ms())
    waiting = replace(QUEUED, reason=Reason.WAITING_FOR_CAPACITY, message="Waits for the operator to make its Pod.")
    assert await told(nodes, waiting) is None
    found = await told(nodes, waiting, "nobody leads")
    assert found is not None
    assert found[0] is Reason.NO_CONTROLLER
    assert await told(nodes, replace(QUEUED, reason=Reason.UNSCHEDULABLE, message="no room"), "nobody leads") is None


async def test_one_look_at_the_workers_tells_of_all_tasks_with_one_wish_also_of_those_that_wait_for_another_attempt(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Resources] = []

    def noting(wish: Resources, *arguments: Any) -> Waiting:
        looks.append(wish)
        return explain_wish(wish, *arguments)

    monkeypatch.setattr(crew, "explain_wish", noting)
    lost = [replace(QUEUED, attempt=1, message=f"Worker worker-{number} was lost.") for number in range(3)]
    told = await Crew(store, Lead(store), settings).why([*lost, QUEUED])
    assert looks == [SPEC.resources]
    nobody = "No worker has joined: start an agent with `cloudai agent`."
    before = [f"Worker worker-{number} was lost. " for number in range(3)]
    assert told == [Waiting(Reason.NO_WORKERS, f"{words}{nobody}") for words in [*before, ""]]
