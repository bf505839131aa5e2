"""What an operator tells of itself, and how it takes a cluster that is not as it should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import free_port
from tests.kube.faulty import Faulty
from tests.kube.kube import Operating, Place


def figures(port: int) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_it_counts_what_it_does(place: Place) -> None:
    port = free_port()
    with place.operator(port=str(port)):
        waiting = place.apply("true", resources={"cpu": "1000", "memory": "1Gi"})
        place.until_reason(waiting, "Unschedulable")
        place.until(place.apply("exit 1", maxRetries=1), "Failed")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        found = figures(port)
        assert found["cloudai_controller_leading"] == 1
        assert found["cloudai_controller_queued_tasks"] == 1
        assert found["cloudai_controller_placements_total"] == 3
        assert found["cloudai_controller_actions_totalfailed"] == 1
        assert found["cloudai_controller_plan_seconds_count"] > 3
        assert found["cloudai_controller_errors_total"] == 0


def test_a_standby_is_ready_and_does_not_lead(place: Place) -> None:
    port = free_port()
    with place.operator():
        waiting = place.start_operator(port=str(port))
        try:
            waiting.until_it_says("another operator leads")
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            assert figures(port)["cloudai_controller_leading"] == 0
        finally:
            waiting.stop()


async def test_it_waits_for_the_task_resource_and_hears_of_tasks_from_then_on(place: Place, tmp_path: Path) -> None:
    async with behind(place, tmp_path, absent="/tasks") as (faulty, operator, probe):
        await said(operator, "cannot be listed: 404 NotFound: the cluster has no Task resource")
        lacking = await probe.get("/readyz")
        faulty.absent = None
        await completes_two(place)
        found = await probe.get("/readyz")
    assert (lacking.status_code, found.status_code) == (503, 200)
    assert "the cluster has no Task resource" in lacking.text


async def test_it_is_not_ready_where_it_could_not_take_over(place: Place, tmp_path: Path) -> None:
    async with behind(place, tmp_path, always="broken") as (faulty, operator, probe):
        await said(operator, "the lease cannot be had")
        away = await probe.get("/readyz")
        faulty.always = ""
        await said(operator, "This operator leads")
        back = await probe.get("/readyz")
    assert (away.status_code, back.status_code) == (503, 200)
    assert "another operator leads" not in operator.said()


async def test_it_hears_of_tasks_again_after_watches_were_refused(place: Place, tmp_path: Path) -> None:
    async with behind(place, tmp_path, due={"/tasks": "gone", "/pods": "gone"}) as (faulty, operator, _):
        await said(operator, "events broke off")
        await completes_two(place)
    assert not faulty.due


@contextlib.asynccontextmanager
async def behind(
    place: Place, tmp_path: Path, **wrong: object
) -> AsyncIterator[tuple[Faulty, Operating, httpx.AsyncClient]]:
    """An operator behind an API server of which that is `wrong`, and who probes it."""
    port = free_port()
    with place.almighty(tmp_path) as almighty:
        faulty = Faulty(almighty)
        vars(faulty).update(wrong)
        async with faulty.serving(tmp_path) as kubeconfig:
            operator = await asyncio.to_thread(place.start_operator, kubeconfig=str(kubeconfig), port=str(port))
            try:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as probe:
                    yield faulty, operator, probe
            finally:
                await asyncio.to_thread(operator.stop)


async def said(operator: Operating, words: str) -> None:
    await asyncio.to_thread(operator.until_it_says, words)


async def completes_two(place: Place) -> None:
    """The second one is not there yet when anything is listed on account of the first."""
    for _ in range(2):
        name = await asyncio.to_thread(place.apply, "true")
        await asyncio.to_thread(place.until, name, "Completed")
