"""Whole random lives of tasks and workers; `World` asserts the promises at each change."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cloudai.resources import RUN_TRANSITIONS, Resources, RunPhase
from cloudai_controller.actions import Place
from cloudai_controller.plan import plan
from tests.controller.world import World, a_worker

AMOUNTS = st.builds(
    Resources,
    cpu=st.sampled_from([500, 1000, 2000, 4000, 9000]),
    memory=st.sampled_from([1, 2, 4]),
    storage=st.sampled_from([0, 1]),
    gpu=st.sampled_from([0, 0, 0, 300, 500, 1000, 1500]),
)
CAPACITIES = st.sampled_from([Resources(4000, 8, 4, 0), Resources(4000, 4, 8, 2000), Resources(8000, 6, 4, 1000)])
SKEWS = [0, 0, -31_000, 31_000, -325_000, 3_600_000]  # ms
NAMES = ["worker-1", "worker-2", "worker-3"]


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(capacities=st.lists(CAPACITIES, max_size=3), skew=st.sampled_from(SKEWS))
    def begin(self, capacities: list[Resources], skew: int) -> None:
        self.world.skew = skew
        for name, capacity in zip(NAMES, capacities, strict=False):
            self.world.join(a_worker(name, capacity))

    @rule(amounts=AMOUNTS, max_retries=st.sampled_from([None, None, 0, 2]), count=st.integers(1, 4))
    def submit(self, amounts: Resources, max_retries: int | None, count: int) -> None:
        for _ in range(count):
            self.world.submit(amounts, max_retries)

    @precondition(lambda self: self.world.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.tasks))))

    @precondition(lambda self: self.world.live_runs())
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.world.live_runs()))
        following = sorted(RUN_TRANSITIONS[run.phase] - {RunPhase.LOST})
        self.world.report(run.run_id, data.draw(st.sampled_from(following)))

    @rule(name=st.sampled_from(NAMES), capacity=CAPACITIES)
    def join(self, name: str, capacity: Resources) -> None:
        if name not in self.world.workers:
            self.world.join(a_worker(name, capacity))

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), ready=st.booleans())
    def beat(self, data: st.DataObject, ready: bool) -> None:
        self.world.beat(data.draw(st.sampled_from(sorted(self.world.workers))), ready=ready)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.workers)))
        if all(run.worker_id != name for run in self.world.live_runs()):
            self.world.leave(name)

    @rule(seconds=st.sampled_from([1, 20, 40, 200, 400]))
    def wait(self, seconds: int) -> None:
        self.world.now += seconds * 1000

    @rule()
    def look(self) -> None:
        self.world.look()

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def one_pass(self) -> None:
        self.world.act()

    @rule()
    def come_to_rest(self) -> None:
        self.world.rest()
        anew = self.world.read_again()
        assert plan(anew, self.world.now).actions == [], "a controller that reads anew would do something"

    @invariant()
    def what_is_remembered_changes_no_decision(self) -> None:
        world = self.world
        anew = world.read_again()
        remembered, read = plan(world.view, world.now).actions, plan(anew, world.now).actions
        places = [action for action in remembered if isinstance(action, Place)]
        assert places == [action for action in read if isinstance(action, Place)]


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=100, stateful_step_count=40)
