"""One agent and real processes: what it does with a run in every situation that needs no controller."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from cloudai.resources import RunPhase
from cloudai.settings import Settings
from cloudai.store.protocol import Lease
from cloudai.wire import LONGEST_PROBLEM, PATH, Register, encode
from cloudai_agent import loop
from cloudai_agent.process import ProcessRuntime
from cloudai_agent.runtime import ContainerState, EngineDown
from tests.agent.joined import MIB, PATIENCE, TOKEN, eventually, joined
from tests.engines.proxy import Proxy

ENDS = (RunPhase.SUCCEEDED, RunPhase.FAILED, RunPhase.STOPPED, RunPhase.LOST)
STUBBORN = "trap '' TERM; while true; do sleep 0.05; done"


class Pulling(ProcessRuntime):
    """Processes, and a registry that never answers for the image `silent`. `pulls`: how many are under way."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._counting = threading.Lock()
        self.pulls = self.begun = 0

    def has_image(self, image: str) -> bool:
        return image != "silent"

    def pull(self, image: str, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        with self._counting:
            self.pulls += 1
            self.begun += 1
        while not cancelled():
            time.sleep(0.05)
        with self._counting:
            self.pulls -= 1


class Hanging(ProcessRuntime):
    """An engine that may stop answering."""

    hangs = False
    words = "nothing came in time"

    def ping(self) -> None:
        if self.hangs:
            raise EngineDown(self.words)


async def test_a_run_comes_to_its_end_with_its_log_and_its_container_is_removed(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        run = await place.run("echo out; echo err >&2")
        async with place.agent() as runtime:
            ended = await place.until(run, *ENDS)
            await eventually("the container is removed", lambda: not runtime.containers())
        assert (ended.phase, ended.exit_code, ended.reason) == (RunPhase.SUCCEEDED, 0, None)
        assert None not in (ended.started_at, ended.finished_at)
        assert await place.log(run) == "out\nerr\n"


async def test_runs_placed_one_after_the_other_all_end(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent():
        runs = [await place.run(f"echo {number}; exit {number % 3}") for number in range(30)]
        for number, run in enumerate(runs):
            ended = await place.until(run, *ENDS)
            assert ended.exit_code == number % 3
            assert (ended.started_at or 0) <= (ended.finished_at or 0)
            assert await place.log(run) == f"{number}\n"


async def test_a_bad_end_has_its_exit_code_and_reason(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent():
        ended = await place.until(await place.run("exit 3"), *ENDS)
        assert (ended.phase, ended.exit_code, ended.reason) == (RunPhase.FAILED, 3, "ExitCode")


async def test_what_was_cancelled_before_it_started_never_starts(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        run = await place.run(f"touch {tmp_path}/started", stop_requested=True)
        async with place.agent() as runtime:
            ended = await place.until(run, *ENDS)
            assert (ended.phase, ended.reason) == (RunPhase.STOPPED, "Cancelled")
            await eventually("nothing is left", lambda: not runtime.containers())
        assert not (tmp_path / "started").exists()


async def test_a_cancelled_run_is_stopped_even_if_it_ignores_that(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent() as runtime:
        run = await place.run(f"echo ready; {STUBBORN}")
        await place.store.wait_log(run.task_id, run.attempt, 0, 60)
        await place.change(run.run_id, stop_requested=True)
        ended = await place.until(run, *ENDS)
        assert (ended.phase, ended.exit_code) == (RunPhase.STOPPED, 137)
        await eventually("nothing is left", lambda: not runtime.containers())


async def test_a_run_that_is_not_wished_any_more_is_stopped_and_removed(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent() as runtime:
        run = await place.run(STUBBORN)
        await place.until(run, RunPhase.RUNNING)
        await place.change(run.run_id, phase=RunPhase.LOST)
        await eventually("nothing is left", lambda: not runtime.containers())
        assert (await place.until(run, *ENDS)).phase is RunPhase.LOST


async def test_a_run_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent():
        ended = await place.until(await place.run(STUBBORN, timeout_seconds=1), *ENDS)
        assert (ended.phase, ended.reason) == (RunPhase.FAILED, "DeadlineExceeded")
        assert (ended.finished_at or 0) - (ended.started_at or 0) >= 1000


async def test_a_run_that_writes_too_much_is_stopped(tmp_path: Path) -> None:
    async with joined(tmp_path, storage_check_seconds=0.1) as place, place.agent():
        run = await place.run("head -c 2000000 /dev/zero >big; sleep 1000", storage=MIB)
        ended = await place.until(run, *ENDS)
        assert (ended.phase, ended.reason) == (RunPhase.FAILED, "StorageLimitExceeded")


async def test_a_container_that_somebody_removed_is_not_started_again(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        run = await place.run(f"echo x >>{tmp_path}/starts; sleep 1000")
        async with place.agent() as runtime:
            await place.until(run, RunPhase.RUNNING)
            await eventually("it started", (tmp_path / "starts").exists)
            runtime.stop(run.run_id, 0)
            runtime.remove(run.run_id)
            ended = await place.until(run, *ENDS)
        assert ended.phase is RunPhase.FAILED
        assert (tmp_path / "starts").read_text() == "x\n"


async def test_the_next_agent_takes_the_containers_up(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        go = tmp_path / "go"
        run = await place.run(f"echo x >>{tmp_path}/starts; echo a; until [ -e {go} ]; do sleep 0.05; done; echo b")
        async with place.agent():
            await place.store.wait_log(run.task_id, run.attempt, 0, 60)
            await place.until(run, RunPhase.RUNNING)
        async with place.agent():
            go.touch()
            ended = await place.until(run, *ENDS)
        assert ended.phase is RunPhase.SUCCEEDED
        assert (tmp_path / "starts").read_text() == "x\n"
        assert await place.log(run) == "a\nb\n"


async def test_what_was_removed_while_no_agent_was_there_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(loop, "PING_SECONDS", 0.1)
    async with joined(tmp_path) as place:
        memory = tmp_path / "lease-worker-1.json"
        async with place.agent():
            await eventually("a heartbeat is remembered", memory.exists)
        before = json.loads(memory.read_text())
        memory.write_text(json.dumps(before | {"ordered": {"task-1-1": {"cause": "cancelled", "at": 1}}}))
        async with place.agent():
            await place.until(await place.run("true"), *ENDS)
            await eventually("it is forgotten", lambda: json.loads(memory.read_text())["ordered"] == {})


async def test_an_agent_that_is_stopped_says_so_and_its_tasks_tell_what_is_uncertain(tmp_path: Path) -> None:
    async with joined(tmp_path, heartbeat_seconds=30.0) as place, httpx.AsyncClient() as http:
        await place.store.put_lease(Lease("controller", "one", 1, 0), 0)
        stop = asyncio.Event()
        async with place.agent(stop=stop):
            assert (await place.until_worker(lambda worker: worker.ready)).problem is None
            stop.set()
        stopped = await place.until_worker(lambda worker: not worker.ready)
        assert stopped.problem == "its agent was stopped"
        late = await place.run("true")
        task = (await http.get(f"http://127.0.0.1:{place.port}/api/tasks/{late.task_id}")).json()
        assert task["reason"] == "WorkerInactive"
        assert "its agent was stopped. The task goes on there once the worker is back." in task["message"]
        async with place.agent():
            assert (await place.until(late, *ENDS)).phase is RunPhase.SUCCEEDED
            assert (await place.until_worker(lambda worker: worker.ready)).problem is None


async def test_an_engine_that_hangs_while_nothing_is_asked_of_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PING_SECONDS", 0.05)
    async with joined(tmp_path, heartbeat_seconds=30.0) as place:
        runtime = Hanging(place.settings)
        async with place.agent(runtime):
            await place.until_worker(lambda worker: worker.ready)
            runtime.hangs = True
            assert (await place.until_worker(lambda worker: not worker.ready)).problem == "nothing came in time"
            runtime.hangs = False
            assert (await place.until_worker(lambda worker: worker.ready)).problem is None


async def test_an_engine_of_many_words_keeps_no_worker_from_joining_again(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, asyncio.timeout(PATIENCE):
        runtime = Hanging(place.settings)
        runtime.words = "x" * 5000
        async with place.agent(runtime):
            await place.until_worker(lambda worker: worker.ready)
            runtime.hangs = True
            worker = await place.until_worker(lambda worker: not worker.ready)
            assert worker.problem == runtime.words[:LONGEST_PROBLEM]
            headers = {"Authorization": f"Bearer {TOKEN}"}
            url = f"ws://127.0.0.1:{place.port}{PATH}"
            async with connect(url, additional_headers=headers, proxy=None) as other:
                taken = {"worker_id": "worker-1", "identity": worker.identity, "address": "", "runtime": "process"}
                await other.send(encode(Register(**taken, cpu=1, memory=1, storage=0, gpu=0)))
                await other.wait_closed()  # since the agent, whose place it took, has joined again
            assert other.close_reason == "a newer connection of this worker"
        assert (await place.store.get_workers())["worker-1"].problem == worker.problem


async def test_an_end_that_nobody_saw_is_told_by_the_next_agent(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        run = await place.run("sleep 0.2; echo last words; exit 7")
        async with place.agent() as runtime:
            await place.until(run, RunPhase.RUNNING)
        with place.processes() as looking:
            await eventually("it ended", lambda: looking.containers()[0].state is ContainerState.EXITED)
        async with place.agent() as runtime:
            ended = await place.until(run, *ENDS)
            await eventually("nothing is left", lambda: not runtime.containers())
        assert (ended.exit_code, await place.log(run)) == (7, "last words\n")


async def test_a_log_that_is_too_long_is_cut_with_a_mark(tmp_path: Path) -> None:
    async with joined(tmp_path, max_log_bytes=1024) as place, place.agent():
        run = await place.run("head -c 5000000 /dev/zero | tr '\\0' x")
        assert (await place.until(run, *ENDS)).phase is RunPhase.SUCCEEDED
        assert await place.log(run) == "x" * 1024 + "\n[cloudai: the log was cut at 1024 bytes]\n"


async def test_a_long_log_arrives_whole_over_a_network_that_breaks(tmp_path: Path) -> None:
    async with joined(tmp_path, lease_seconds=60.0) as place:
        with Proxy(place.port) as network:
            go = tmp_path / "go"
            some = "seq 100000 400000"
            run = await place.run(f"{some}; until [ -e {go} ]; do sleep 0.05; done; {some}")
            async with place.agent(port=network.port):
                await place.store.wait_log(run.task_id, run.attempt, 0, 60)
                network.cut()
                go.touch()
                network.mend()
                ended = await place.until(run, *ENDS)
        assert ended.phase is RunPhase.SUCCEEDED
        lines = "".join(f"{number}\n" for number in range(100000, 400001))
        assert await place.log(run) == lines * 2


async def test_a_worker_cut_off_for_longer_than_its_lease_stops_its_containers(tmp_path: Path) -> None:
    async with joined(tmp_path, lease_seconds=2.0) as place:
        with Proxy(place.port) as network:
            run = await place.run(f"echo last; {STUBBORN}")
            async with place.agent(port=network.port) as runtime:
                await place.until(run, RunPhase.RUNNING)
                network.cut()
                await eventually("it ended", lambda: runtime.containers()[0].state is ContainerState.EXITED)
                network.mend()
                ended = await place.until(run, *ENDS)
                await eventually("nothing is left", lambda: not runtime.containers())
        assert (ended.phase, ended.reason) == (RunPhase.LOST, "WorkerLost")
        assert await place.log(run) == "last\n"


async def test_a_restarted_agent_goes_by_the_lease_of_the_one_before(tmp_path: Path) -> None:
    async with joined(tmp_path, lease_seconds=2.0) as place:
        with Proxy(place.port) as network:
            run = await place.run(STUBBORN)
            async with place.agent(port=network.port):
                await place.until(run, RunPhase.RUNNING)
            network.cut()
            async with place.agent(port=network.port):
                with place.processes() as looking:
                    await eventually("it ended", lambda: looking.containers()[0].state is ContainerState.EXITED)
                    network.mend()
                    await eventually("nothing is left", lambda: not looking.containers())


async def test_a_wish_of_any_size_reaches_the_agent(tmp_path: Path) -> None:
    async with joined(tmp_path) as place:
        runs = [await place.run("x" * 2_000_000, stop_requested=True) for _ in range(10)]
        async with place.agent():
            for run in runs:
                assert (await place.until(run, *ENDS)).phase is RunPhase.STOPPED


async def test_pulls_that_never_end_hold_up_nothing_else(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent(runtime := Pulling(place.settings)):
        stubborn = await place.run(STUBBORN)
        await place.until(stubborn, RunPhase.RUNNING)
        waiting = [await place.run("true", image="silent") for _ in range(100)]
        await eventually("all are pulled", lambda: runtime.pulls == len(waiting))
        assert (await place.until(await place.run("true"), *ENDS)).phase is RunPhase.SUCCEEDED
        await place.change(stubborn.run_id, stop_requested=True)
        assert (await place.until(stubborn, *ENDS)).phase is RunPhase.STOPPED
        for run in waiting:
            await place.change(run.run_id, stop_requested=True)
            assert (await place.until(run, *ENDS)).phase is RunPhase.STOPPED


class Stubborn(ProcessRuntime):
    """Processes that are only stopped when as many as `together` counts are being stopped."""

    def __init__(self, settings: Settings, together: int) -> None:
        super().__init__(settings)
        self._together = threading.Barrier(together)

    def stop(self, run_id: str, grace_seconds: float) -> None:
        if grace_seconds:  # none is left to one that is removed
            self._together.wait(PATIENCE)
        super().stop(run_id, 0)


async def test_all_containers_are_stopped_at_once_however_many_there_are(tmp_path: Path) -> None:
    async with joined(tmp_path) as place, place.agent(Stubborn(place.settings, together=70)):
        runs = [await place.run("exec sleep 1000") for _ in range(70)]
        for run in runs:
            await place.until(run, RunPhase.RUNNING)
        for run in runs:
            await place.change(run.run_id, stop_requested=True)
        for run in runs:
            assert (await place.until(run, *ENDS)).phase is RunPhase.STOPPED


async def test_a_worker_cut_off_for_longer_than_its_lease_gives_up_its_pulls_and_begins_them_anew(
    tmp_path: Path,
) -> None:
    async with joined(tmp_path, lease_seconds=2.0) as place:
        with Proxy(place.port) as network:
            async with place.agent(runtime := Pulling(place.settings), port=network.port):
                run = await place.run("true", image="silent")
                await place.until(run, RunPhase.PULLING)
                network.cut()
                await eventually("it is given up", lambda: runtime.pulls == 0)
                network.mend()
                await eventually("it is tried again", lambda: runtime.begun == 2)
                assert (await place.until(run, RunPhase.PULLING)).phase is RunPhase.PULLING
