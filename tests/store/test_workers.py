"""What workers write: themselves, heartbeats, reports, logs; and join tokens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import GIB, GpuShare, Resources, RunPhase, TaskStatus
from cloudai.store.protocol import Heartbeat, Store
from tests.store.values import SPEC, WORKER, finished, first_run, placed, report

BEAT = Heartbeat("worker-1", "identity-1", 2000, True, None, 12.5, 50.0)


async def test_a_worker_that_registers_again_keeps_the_time_of_its_first(store: Store) -> None:
    await store.register_worker(WORKER)
    again = replace(WORKER, registered_at=9000, last_heartbeat=9000, address="10.0.0.1:1")
    assert (await store.register_worker(again)).registered_at == 1000
    assert await store.get_workers() == {"worker-1": replace(again, registered_at=1000)}


async def test_a_shorter_lease_counts_once_its_agent_is_known_to_have_heard_of_it(store: Store) -> None:
    async def lease() -> int:
        return (await store.get_workers())["worker-1"].lease

    await store.register_worker(replace(WORKER, lease=600_000))
    assert (await store.register_worker(replace(WORKER, lease=70_000))).lease == await lease() == 600_000
    await store.record_heartbeats([BEAT])
    assert await lease() == 600_000
    await store.record_heartbeats([replace(BEAT, lease=70_000)])
    assert await lease() == 70_000
    assert (await store.register_worker(replace(WORKER, lease=600_000))).lease == await lease() == 600_000


async def test_a_heartbeat_is_kept_and_only_readiness_is_a_change(store: Store) -> None:
    await store.register_worker(WORKER)
    before = (await store.snapshot()).revision
    await store.record_heartbeats([BEAT])
    worker = (await store.get_workers(["worker-1"]))["worker-1"]
    assert (worker.last_heartbeat, worker.cpu_usage, worker.memory_usage) == (2000, 12.5, 50.0)
    assert (await store.snapshot()).revision == before
    await store.record_heartbeats([replace(BEAT, ready=False, problem="no engine")])
    assert (await store.snapshot()).revision == before + 1


async def test_a_heartbeat_of_another_machine_changes_nothing(store: Store) -> None:
    await store.register_worker(WORKER)
    others = [replace(BEAT, identity="another"), replace(BEAT, worker_id="nobody")]
    assert await store.record_heartbeats(others) == set()
    assert await store.get_workers() == {"worker-1": WORKER}


async def test_whose_heartbeats_were_stored_is_told(store: Store) -> None:
    await store.register_worker(WORKER)
    await store.register_worker(replace(WORKER, worker_id="worker-2", identity="identity-2"))
    taken = replace(BEAT, worker_id="worker-2")  # with the identity of worker-1
    batches = [[BEAT], [BEAT, replace(taken, identity="identity-2")], [taken], []]
    told = await asyncio.gather(*(store.record_heartbeats(beats) for beats in batches))
    first, second = ("worker-1", "identity-1"), ("worker-2", "identity-2")
    assert told == [{first}, {first, second}, set(), set()]


async def test_what_a_worker_holds_is_the_sum_of_its_live_runs(store: Store) -> None:
    await store.register_worker(WORKER)
    spec = replace(SPEC, resources=Resources(1000, GIB, 2 * GIB, 500))
    task = await store.create_task(spec)
    run = first_run(task, gpus=(GpuShare(1, 500),))
    await store.commit([(replace(task, status=TaskStatus.PENDING, attempt=1, worker_id="worker-1"), run)])
    await finished(store)
    state = await store.get_worker("worker-1")
    assert (state.allocated, state.runs, state.gpu_free) == (spec.resources, 1, (1000, 500))
    assert state.available + state.allocated == WORKER.capacity
    assert await store.list_workers() == [state]
    assert [each.run_id for each in await store.runs_of_worker("worker-1")] == [run.run_id]
    with pytest.raises(CloudAIError) as caught:
        await store.get_worker("nobody")
    assert caught.value.code is Code.WORKER_NOT_FOUND


async def test_what_several_runs_hold_is_told_of_each_worker_and_each_device(store: Store) -> None:
    for name in ("worker-1", "worker-2"):
        await store.register_worker(replace(WORKER, worker_id=name, identity=name))
    shares = [(GpuShare(0, 1000), GpuShare(1, 250)), (), (GpuShare(1, 500),)]
    for taken in shares:
        gpu = sum(share.milli for share in taken)
        task = await store.create_task(replace(SPEC, resources=Resources(1000, GIB, 0, gpu)))
        run = first_run(task, gpus=taken)
        await store.commit([(replace(task, status=TaskStatus.PENDING, attempt=1, worker_id="worker-1"), run)])
    busy, idle = await store.list_workers()
    assert (busy.allocated, busy.runs, busy.gpu_free) == (Resources(3000, 3 * GIB, 0, 1750), 3, (0, 250))
    assert (idle.allocated, idle.runs, idle.gpu_free) == (Resources(0, 0, 0, 0), 0, (1000, 1000))
    assert await store.get_worker("worker-2") == idle


async def test_a_report_follows_the_table_of_transitions(store: Store) -> None:
    _, run = await placed(store)
    assert (await store.report_run(report(run, RunPhase.RUNNING))) == run  # not before starting
    pulling = await store.report_run(report(run, RunPhase.PULLING, message="1 of 3"))
    assert pulling is not None
    assert (pulling.phase, pulling.message, pulling.version) == (RunPhase.PULLING, "1 of 3", 2)
    same = await store.report_run(report(run, RunPhase.PULLING))
    assert same == pulling
    ended = await store.report_run(report(run, RunPhase.FAILED, exit_code=3, reason="ExitCode"))
    assert ended is not None
    assert (ended.phase, ended.exit_code, ended.message) == (RunPhase.FAILED, 3, "1 of 3")
    assert await store.report_run(report(run, RunPhase.SUCCEEDED)) == ended


async def test_a_report_of_what_is_not_ones_own_changes_nothing(store: Store) -> None:
    _, run = await placed(store)
    assert await store.report_run(report(replace(run, worker_id="worker-2"), RunPhase.FAILED)) is None
    assert await store.report_run(report(replace(run, attempt=2), RunPhase.FAILED)) is None
    assert await store.report_run(report(replace(run, task_id="task-7"), RunPhase.FAILED)) is None
    assert await store.get_runs([run.run_id]) == {run.run_id: run}


async def test_a_log_is_appended_without_gaps_or_repetitions(store: Store) -> None:
    task, run = await placed(store)
    assert await store.append_log(run.run_id, 0, b"hello ") == 6
    assert await store.append_log(run.run_id, 3, b"lo world") == 11
    assert await store.append_log(run.run_id, 0, b"hello") == 11
    assert await store.append_log(run.run_id, 20, b"gap") == 11
    assert await asyncio.gather(*(store.append_log(run.run_id, 11, b"!") for _ in range(3))) == [12] * 3
    assert (await store.read_log(task.task_id, None, 0, 100)).data == b"hello world!"
    assert await store.log_ends([run.run_id, f"{task.task_id}-9"]) == {run.run_id: 12, f"{task.task_id}-9": 0}
    with pytest.raises(CloudAIError):
        await store.append_log("task-7-1", 0, b"x")


async def test_a_log_is_read_from_any_byte(store: Store) -> None:
    task, run = await placed(store)
    whole = b""
    for number in range(20):
        whole += b"%d," % number
        await store.append_log(run.run_id, 0, whole)
    for offset in range(len(whole) + 2):
        piece = await store.read_log(task.task_id, 1, offset, 7)
        assert (piece.data, piece.offset, piece.end) == (whole[offset : offset + 7], offset, len(whole))
    assert not piece.complete
    await store.report_run(report(run, RunPhase.FAILED))
    assert (await store.read_log(task.task_id, 1, 0, 0)).complete


async def test_a_task_that_was_never_placed_has_an_empty_log(store: Store) -> None:
    task = await store.create_task(SPEC)
    piece = await store.read_log(task.task_id, None, 0, 10)
    assert (piece.data, piece.end, piece.complete) == (b"", 0, False)
    await store.cancel_task(task.task_id)
    assert (await store.read_log(task.task_id, None, 0, 10)).complete


async def test_an_attempt_that_never_was_is_not_found(store: Store) -> None:
    task, _ = await placed(store)
    for attempt in (0, 2):
        with pytest.raises(CloudAIError) as caught:
            await store.read_log(task.task_id, attempt, 0, 10)
        assert caught.value.code is Code.ATTEMPT_NOT_FOUND


async def test_logs_that_retention_removed_are_gone(store: Store) -> None:
    task, later = await finished(store, at=1000), await finished(store, at=9000)
    assert await store.delete_logs(5000, 10) == 1
    assert await store.delete_logs(5000, 10) == 0
    with pytest.raises(CloudAIError) as caught:
        await store.read_log(task.task_id, None, 0, 10)
    assert caught.value.code is Code.LOGS_REMOVED
    assert (await store.read_log(later.task_id, None, 0, 10)).data == b"done"


async def test_a_follower_of_a_log_is_woken(store: Store) -> None:
    task, run = await placed(store)
    waiting = asyncio.ensure_future(store.wait_log(task.task_id, 1, 0, 60))
    await store.append_log(run.run_id, 0, b"x")
    await waiting
    waiting = asyncio.ensure_future(store.wait_log(task.task_id, 1, 1, 60))
    await store.report_run(report(run, RunPhase.FAILED))
    await waiting
    await store.wait_log(task.task_id, 1, 99, 0.01)  # its end needs no waiting


async def test_tokens_are_known_by_their_digest(store: Store) -> None:
    await store.add_token(b"digest", "name")
    await store.add_token(b"digest", "name")
    assert await store.has_token(b"digest")
    assert not await store.has_token(b"another")
    await store.add_token(b"another", "")
    assert [(token.digest, token.name) for token in await store.list_tokens()] == [
        (b"digest", "name"),
        (b"another", ""),
    ]
    assert await store.remove_token(b"digest")
    assert not await store.remove_token(b"digest")
    assert not await store.has_token(b"digest")
    assert [token.digest for token in await store.list_tokens()] == [b"another"]
    await store.ping()
