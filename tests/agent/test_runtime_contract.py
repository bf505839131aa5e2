"""What every runtime promises, tried on a real engine and on real processes."""

from __future__ import annotations

import threading

import pytest

from cloudai_agent.runtime import ContainerState, RunRefused, Runtime
from tests.agent.conftest import MIB, Bench, ended, eventually, finished, found, started

# A shell of the process runtime says on stderr that its child was ended by the same TERM.
UNTIL_TERM = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.05; done 2>/dev/null"
DEAF = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def first_bytes(runtime: Runtime, run_id: str) -> bytes:
    return next(iter(runtime.read_log(run_id, 0)))


def test_a_run_is_created_then_runs_then_has_ended(bench: Bench, runtime: Runtime) -> None:
    run = bench.run(UNTIL_TERM)
    assert runtime.container(run.run_id) is None
    runtime.create(run)
    created = found(runtime, run.run_id)
    assert (created.state, created.exit_code, created.started_at) == (ContainerState.CREATED, None, None)
    runtime.start(run.run_id)
    running = found(runtime, run.run_id)
    assert (running.state, running.exit_code, running.finished_at) == (ContainerState.RUNNING, None, None)
    assert first_bytes(runtime, run.run_id) == b"ready\n"
    runtime.stop(run.run_id, 30)
    end = found(runtime, run.run_id)
    assert (end.state, end.exit_code, end.refusal) == (ContainerState.EXITED, 3, None)
    assert (end.task_id, end.attempt, end.run_id) == (run.task_id, 1, run.run_id)
    assert end.started_at is not None
    assert end.finished_at is not None
    assert running.started_at == end.started_at <= end.finished_at


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("true", 0),
        ("exit 7", 7),
        (("sh", "-c", "exit 8"), 8),
        ("nosuchprogram", 127),
        ("kill -KILL $$", 137),
        ("kill -TERM $$; sleep 60", 143),
    ],
)
def test_exit_codes_are_those_of_a_shell(bench: Bench, command: str, code: int) -> None:
    end, _ = finished(bench.open(), bench.run(command))
    assert end.exit_code == code


def test_creating_and_starting_again_changes_nothing(bench: Bench, runtime: Runtime) -> None:
    run = bench.run("echo once")
    runtime.create(run)
    runtime.create(run)
    runtime.start(run.run_id)
    runtime.start(run.run_id)
    assert b"".join(runtime.read_log(run.run_id, 0)) == b"once\n"


def test_words_of_a_list_arrive_as_given(bench: Bench, runtime: Runtime) -> None:
    _, text = finished(runtime, bench.run(("printf", "[%s]", "a b", "$HOME", "", "'\"")))
    assert text == b"[a b][$HOME][]['\"]"


def test_the_run_knows_its_task_and_nothing_of_the_agent(
    bench: Bench, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDAI_TEST_SECRET", "secret")
    run = bench.run("env")
    _, text = finished(runtime, run)
    lines = text.decode().splitlines()
    assert f"CLOUDAI_TASK_ID={run.task_id}" in lines
    assert "CLOUDAI_ATTEMPT=1" in lines
    assert "secret" not in text.decode()


def test_both_streams_in_order_and_the_same_bytes_from_every_offset(bench: Bench, runtime: Runtime) -> None:
    # Two streams reach an engine by two pipes: what was written at different times stays apart.
    run = bench.run("for i in 1 2 3; do echo out$i; sleep 0.1; echo err$i >&2; sleep 0.1; done; printf last")
    _, whole = finished(runtime, run)
    assert whole == b"out1\nerr1\nout2\nerr2\nout3\nerr3\nlast"
    for offset in range(len(whole) + 2):
        assert b"".join(runtime.read_log(run.run_id, offset)) == whole[offset:]


def test_a_log_is_followed_while_it_is_written(bench: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, bench.run(UNTIL_TERM))
    pieces = iter(runtime.read_log(run_id, 0))
    assert next(pieces) == b"ready\n"
    runtime.stop(run_id, 30)
    assert b"".join(pieces) == b"told\n"


def test_a_long_log_and_a_long_line_lose_nothing(bench: Bench, runtime: Runtime) -> None:
    command = "seq 200000; head -c 300000 /dev/zero | tr '\\0' x; echo"
    _, text = finished(runtime, bench.run(command))
    numbers = "".join(f"{number}\n" for number in range(1, 200001)).encode()
    assert len(text) == len(numbers) + 300001
    assert text == numbers + b"x" * 300000 + b"\n"


@pytest.mark.parametrize("size", [16383, 16385, 40000])
def test_lines_longer_than_an_engines_buffer_keep_their_ends(bench: Bench, runtime: Runtime, size: int) -> None:
    _, text = finished(runtime, bench.run(f"head -c {size} /dev/zero | tr '\\0' x; echo; echo; echo y; printf z"))
    assert text == b"x" * size + b"\n\ny\nz"


def test_letters_of_several_bytes_survive_in_a_long_line(bench: Bench, runtime: Runtime) -> None:
    _, text = finished(runtime, bench.run("i=0; while [ $i -lt 3000 ]; do printf 'aäöü€😀'; i=$((i+1)); done; echo"))
    assert text.decode() == "aäöü€😀" * 3000 + "\n"


def test_bytes_that_are_no_text_survive(bench: Bench, runtime: Runtime) -> None:
    _, text = finished(runtime, bench.run("printf 'a\\0b\\377\\300c\\n\\001\\r\\n'"))
    assert text == b"a\0b\xff\xc0c\n\x01\r\n"


def test_the_last_line_needs_no_end(bench: Bench, runtime: Runtime) -> None:
    for _ in range(10):
        assert finished(runtime, bench.run("printf end"))[1] == b"end"


def test_what_ignores_term_is_killed_after_the_grace(bench: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, bench.run(DEAF))
    assert first_bytes(runtime, run_id) == b"ready\n"
    runtime.stop(run_id, 1)
    assert found(runtime, run_id).exit_code == 137


def test_what_a_command_leaves_behind_ends_with_it(bench: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, bench.run("(trap '' TERM HUP; while :; do sleep 0.05; done) & echo left; exit 4"))
    end = ended(runtime, run_id)
    assert end.exit_code == 4
    assert b"".join(runtime.read_log(run_id, 0)) == b"left\n"


def test_stopping_what_never_started_ended_or_is_not_there_is_no_error(bench: Bench, runtime: Runtime) -> None:
    run = bench.run("true")
    runtime.stop(run.run_id, 1)
    runtime.remove(run.run_id)
    runtime.create(run)
    runtime.stop(run.run_id, 1)
    assert found(runtime, run.run_id).state is ContainerState.CREATED
    runtime.start(run.run_id)
    ended(runtime, run.run_id)
    runtime.stop(run.run_id, 1)
    assert found(runtime, run.run_id).exit_code == 0


def test_removed_is_gone_with_its_log(bench: Bench, runtime: Runtime) -> None:
    run = bench.run("echo x")
    finished(runtime, run)
    runtime.remove(run.run_id)
    runtime.remove(run.run_id)
    assert runtime.container(run.run_id) is None
    assert runtime.containers() == []
    assert list(runtime.read_log(run.run_id, 0)) == []
    with pytest.raises(RunRefused):
        runtime.start(run.run_id)


def test_a_new_agent_finds_what_an_earlier_one_started(bench: Bench, runtime: Runtime) -> None:
    running, over = bench.run(UNTIL_TERM), bench.run("echo y; exit 5")
    started(runtime, running)
    finished(runtime, over)
    assert first_bytes(runtime, running.run_id) == b"ready\n"
    again = bench.open()
    both = sorted(again.containers(), key=lambda container: container.run_id)
    assert both == sorted(runtime.containers(), key=lambda container: container.run_id)
    assert [container.state for container in both] == [ContainerState.RUNNING, ContainerState.EXITED]
    assert b"".join(again.read_log(over.run_id, 1)) == b"\n"
    again.stop(running.run_id, 30)
    assert found(runtime, running.run_id).exit_code == 3


def test_workers_on_one_machine_do_not_see_each_other(bench: Bench, runtime: Runtime) -> None:
    run_id = started(runtime, bench.run(UNTIL_TERM))
    other = bench.open("worker-2")
    assert other.containers() == []
    assert other.container(run_id) is None
    assert other.storage_used() == {}
    assert list(other.read_log(run_id, 0)) == []
    other.stop(run_id, 0)
    other.remove(run_id)
    assert found(runtime, run_id).state is ContainerState.RUNNING


def test_an_end_is_told_at_once(bench: Bench, runtime: Runtime) -> None:
    told: list[str | None] = []
    listening, end = threading.Event(), threading.Event()
    run = bench.run(UNTIL_TERM)

    def listen() -> None:
        for run_id in runtime.events():
            told.append(run_id)
            listening.set()
            if run_id == run.run_id and found(runtime, run_id).state is ContainerState.EXITED:
                end.set()
                return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listening.wait(30)
    assert told[0] is None
    started(runtime, run)
    assert first_bytes(runtime, run.run_id) == b"ready\n"
    runtime.stop(run.run_id, 30)
    assert end.wait(30)
    thread.join()


def test_storage_grows_with_what_is_written(bench: Bench, runtime: Runtime) -> None:
    command = "dd if=/dev/zero of=file bs=65536 count=80 2>/dev/null; echo ready; while :; do sleep 0.05; done"
    run_id = started(runtime, bench.run(command))
    assert first_bytes(runtime, run_id) == b"ready\n"
    eventually("it is seen", lambda: runtime.storage_used()[run_id] >= 5 * MIB)


def test_a_machine_has_something_to_offer(runtime: Runtime) -> None:
    runtime.ping()
    capacity = runtime.capacity()
    assert capacity.cpu >= 1000
    assert capacity.memory > 100 * MIB
    assert capacity.storage > 0


def test_a_list_made_during_removals_has_each_whole_or_not_at_all(bench: Bench, runtime: Runtime) -> None:
    runs = [bench.run("true") for _ in range(8)]
    for run in runs:
        finished(runtime, run)

    def remove() -> None:
        for run in runs:
            runtime.remove(run.run_id)

    remover = threading.Thread(target=remove)
    remover.start()
    seen = []
    while remover.is_alive():
        seen += runtime.containers()
    remover.join()
    assert {(each.state, each.exit_code) for each in seen} <= {(ContainerState.EXITED, 0)}
    assert runtime.containers() == []
