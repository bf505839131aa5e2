"""Single decisions of the scheduler, and what a pass may cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudai.resources import GpuShare, Resources, RunPhase, TaskStatus
from cloudai_controller.schedule import schedule
from tests.controller.world import World, a_worker

CORE = Resources(1000, 1, 0, 0)
FOUR_CORES = Resources(4000, 4, 0, 0)


def world_with(*capacities: Resources) -> World:
    world = World()
    for number, capacity in enumerate(capacities, start=1):
        world.join(a_worker(f"worker-{number}", capacity))
    return world


def placed(world: World) -> dict[str, str | None]:
    return {name: task.worker_id for name, task in world.tasks.items() if task.worker_id}


def test_a_large_task_is_placed_although_small_ones_never_stop_coming() -> None:
    world = world_with(FOUR_CORES, FOUR_CORES)
    for _ in range(8):
        world.submit(CORE)
    world.rest()
    large = world.submit(FOUR_CORES)
    for _ in range(8):
        world.submit(CORE), world.submit(CORE)
        world.rest()
        oldest = min(world.live_runs(), key=lambda run: run.task_id)
        world.report(oldest.run_id, RunPhase.FAILED)
    world.rest()
    assert world.tasks[large.task_id].status is TaskStatus.PENDING


def test_a_task_larger_than_every_worker_stands_in_nobodys_way() -> None:
    world = world_with(FOUR_CORES)
    world.submit(Resources(5000, 1, 0, 0))
    small = world.submit(CORE)
    world.rest()
    assert placed(world) == {small.task_id: "worker-1"}
    assert world.view.hold is None


def test_two_half_devices_do_not_hold_a_whole_gpu() -> None:
    world = world_with(Resources(4000, 4, 0, 2000))
    for _ in range(2):
        world.submit(Resources(500, 1, 0, 600))
    world.rest()
    world.submit(Resources(500, 1, 0, 700))
    world.rest()
    assert {run.gpus for run in world.live_runs()} == {(GpuShare(0, 600),), (GpuShare(1, 600),)}


def test_work_without_gpus_leaves_gpu_machines_alone() -> None:
    world = world_with(Resources(1000, 1, 0, 1000), Resources(9000, 9, 0, 0))
    task = world.submit(CORE)
    world.rest()
    assert placed(world) == {task.task_id: "worker-2"}


def test_a_task_queued_again_while_its_like_is_placed_is_tried_too() -> None:
    world = world_with(FOUR_CORES)
    world.submit(FOUR_CORES, 2), world.submit(FOUR_CORES, 2)
    world.rest()
    world.report("task-101-1", RunPhase.FAILED)
    world.rest()
    world.report("task-102-1", RunPhase.FAILED)
    world.join(a_worker("worker-2", FOUR_CORES))
    world.rest()
    assert placed(world) == {"task-101": "worker-1", "task-102": "worker-2"}


def test_a_full_cluster_is_not_searched_again_for_a_shape_that_is_known_to_wait() -> None:
    world = world_with(FOUR_CORES)
    for _ in range(10):
        world.submit(CORE)
    world.rest()
    world.submit(CORE)
    assert world.view.settled


@given(
    capacities=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    wishes=st.lists(st.integers(1, 7), max_size=30),
    limit=st.integers(1, 5),
)
def test_passes_with_a_limit_place_the_same_as_one_without(
    capacities: list[int], wishes: list[int], limit: int
) -> None:
    def fill(limit: int) -> dict[str, str | None]:
        world = world_with(*(Resources(cores * 1000 + 1, 99, 0, 0) for cores in capacities))
        for cores in wishes:
            world.submit(Resources(cores * 1000, 1, 0, 0))
        for _ in wishes:
            world.act_within(limit)
        return placed(world)

    assert fill(limit) == fill(1000)


@given(wishes=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=30), workers=st.integers(1, 4))
def test_of_one_shape_none_overtakes_an_older_one(wishes: list[int], workers: int) -> None:
    world = world_with(*[Resources(6000, 99, 0, 0)] * workers)
    for cores in wishes:
        world.submit(Resources(cores * 1000, 1, 0, 0))
    made = schedule(world.view, world.now, 1000)
    for cores in set(wishes):
        alike = [name for name, task in world.tasks.items() if task.spec.resources.cpu == cores * 1000]
        chosen = [p.task.task_id for p in made.placements if p.task.spec.resources.cpu == cores * 1000]
        assert chosen == alike[: len(chosen)]
