"""The agent's decisions against every order in which a server, an engine and restarts may behave."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from cloudai.resources import GIB, RUN_TRANSITIONS, Resources, Run, RunPhase
from cloudai_agent.reconcile import Create, Fetch, Ordered, Remove, Start, Stop, Tell, View, next_step
from cloudai_agent.runtime import Container, ContainerState

WISH = Run(
    task_id="task-1",
    attempt=1,
    worker_id="worker-1",
    user_id="user",
    image="image",
    command="true",
    resources=Resources(1000, GIB, GIB, 0),
)


@dataclass
class World:
    """A server that stores reports, an engine that starts containers, an agent that may be killed at any instant."""

    stored: Run = WISH
    container: Container | None = None
    fetched: bool = False
    ordered: Ordered | None = None
    starts: int = 0
    creates: int = 0
    foreign_removal: bool = False
    now: int = 0

    @property
    def wish(self) -> Run | None:
        return None if self.stored.phase.terminal else self.stored

    def view(self) -> View:
        exited = self.container is not None and self.container.state is ContainerState.EXITED
        return View(
            wish=self.wish,
            container=self.container,
            now=self.now,
            fetched=self.fetched,
            ordered=self.ordered,
            logs_stored=exited,
        )

    def act(self) -> bool:
        """One step of the agent; False when there is none."""
        self.now += 1000
        step = next_step(self.view())
        match step:
            case None:
                return False
            case Fetch():
                self.fetched = True
            case Create():
                assert self.container is None
                self.creates += 1
                self.container = Container(run_id="task-1-1", task_id="task-1", attempt=1, state=ContainerState.CREATED)
            case Start():
                assert self.stored.phase is RunPhase.STARTING, "started before the server knew"
                assert not self.stored.stop_requested
                self.starts += 1
                assert self.container is not None
                self.container = replace(self.container, state=ContainerState.RUNNING, started_at=self.now)
            case Stop(cause):
                if self.ordered is None and cause is not None:
                    self.ordered = Ordered(cause, self.now)
                self.end(143)
            case Remove():
                assert self.wish is None, "removed before the server let go"
                self.container = None
            case Tell():
                self.tell(step)
        return True

    def tell(self, tell: Tell) -> None:
        if self.stored.phase.terminal:
            return
        assert tell.phase is self.stored.phase or tell.phase in RUN_TRANSITIONS[self.stored.phase]
        if tell.phase.terminal and self.container is not None:
            assert self.container.state is not ContainerState.RUNNING, "told an end before it"
        self.stored = replace(self.stored, phase=tell.phase, reason=tell.reason)

    def end(self, code: int) -> None:
        if self.container is not None and self.container.state is ContainerState.RUNNING:
            self.container = replace(self.container, state=ContainerState.EXITED, finished_at=self.now, exit_code=code)

    def happen(self, what: str) -> None:
        match what:
            case "agent killed":
                self.fetched, self.ordered = False, None
            case "cancel":
                if not self.stored.phase.terminal:
                    self.stored = replace(self.stored, stop_requested=True)
            case "lost":
                if not self.stored.phase.terminal:
                    self.stored = replace(self.stored, phase=RunPhase.LOST)
            case "success":
                self.end(0)
            case "failure":
                self.end(1)
            case "removed by hand":
                self.container = None
            case "act":
                self.act()


EVENTS = ["act", "act", "act", "agent killed", "cancel", "lost", "success", "failure", "removed by hand"]


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_every_history_ends_with_one_start_at_most_and_nothing_left(events: list[str]) -> None:
    world = World()
    for event in events:
        world.happen(event)
    for code in (0, 0, 0):
        while world.act():
            pass
        world.end(code)
    while world.act():
        pass
    assert world.stored.phase.terminal
    assert world.container is None
    assert world.starts <= 1


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_the_same_view_gives_the_same_step(events: list[str]) -> None:
    world = World()
    for event in events:
        world.happen(event)
        assert next_step(world.view()) == next_step(world.view())
