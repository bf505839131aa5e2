"""An engine that is stopped, killed and started again under the agent's hands."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudai.settings import Settings
from cloudai_agent.docker import DockerRuntime
from cloudai_agent.runtime import ContainerState, EngineDown, RunRefused
from tests.agent.conftest import Bench, bench_of, eventually, found, started
from tests.engines.dockerd import PrivateDocker
from tests.engines.dockerproxy import START, DockerProxy
from tests.engines.images import build_busybox

ESTABLISHED, KEEP_ALIVE = "01", "02"  # what the kernel calls a state of a connection, and a kind of timer

pytestmark = [
    pytest.mark.docker,
    # The SDK leaves its socket to the garbage collector where nobody listens.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def own_engine() -> Iterator[PrivateDocker]:
    with PrivateDocker() as engine:
        build_busybox(engine.host)
        yield engine


@pytest.fixture
def bench(own_engine: PrivateDocker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", own_engine.host)
        with bench_of("docker", tmp_path_factory.mktemp("data"), build_busybox(own_engine.host)) as bench:
            yield bench


def test_an_engine_that_is_not_there_is_told_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    runtime = DockerRuntime(Settings())
    runtime.bind("cluster", "worker")
    calls: list[Callable[[], object]] = [
        runtime.ping,
        runtime.capacity,
        runtime.containers,
        runtime.storage_used,
        lambda: runtime.container("task-1-1"),
        lambda: runtime.has_image("busybox"),
        lambda: runtime.pull("busybox", print, lambda: False),
        lambda: runtime.start("task-1-1"),
        lambda: runtime.stop("task-1-1", 0),
        lambda: runtime.remove("task-1-1"),
        lambda: list(runtime.read_log("task-1-1", 0)),
    ]
    for call in calls:
        with pytest.raises(EngineDown, match="there is no socket"):
            call()
    runtime.close()


def test_a_followed_log_loses_nothing_when_the_engine_is_killed(bench: Bench, own_engine: PrivateDocker) -> None:
    runtime = bench.open()
    run_id = started(runtime, bench.run("i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done"))
    seen = b""
    pieces = runtime.read_log(run_id, 0)
    while len(seen) < 200:
        seen += next(pieces)
    own_engine.kill()
    rest: list[bytes] = []
    with pytest.raises(EngineDown):
        rest.extend(pieces)
    seen += b"".join(rest)
    with pytest.raises(EngineDown):
        runtime.ping()
    own_engine.start()
    # An engine that finds containers of one that was killed ends them.
    runtime.stop(run_id, 1)
    seen += b"".join(runtime.read_log(run_id, len(seen)))
    lines = seen.splitlines()
    assert lines == [b"line %d" % number for number in range(1, len(lines) + 1)]
    assert found(runtime, run_id).exit_code is not None


def test_events_go_on_after_a_restart(bench: Bench, own_engine: PrivateDocker) -> None:
    runtime = bench.open()
    told: list[str | None] = []

    listener = threading.Thread(target=lambda: told.extend(runtime.events()))
    listener.start()
    eventually("it listens", lambda: None in told)
    own_engine.restart()
    run_id = started(runtime, bench.run("true"))
    eventually("the gap is told", lambda: told.count(None) > 1)
    eventually("the end is told", lambda: run_id in told)
    runtime.close()
    listener.join(60)
    assert not listener.is_alive()


def test_an_engine_that_hangs_is_down(bench: Bench, own_engine: PrivateDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudai_agent.docker.PING_SECONDS", 0.2)
    runtime = bench.open()
    runtime.ping()
    own_engine.pause()
    try:
        with pytest.raises(EngineDown):
            runtime.ping()
    finally:
        own_engine.go_on()
    runtime.ping()


@pytest.fixture
def proxy(own_engine: PrivateDocker) -> Iterator[DockerProxy]:
    with DockerProxy(own_engine.host) as proxy:
        yield proxy


@pytest.fixture
def tcp_proxy(own_engine: PrivateDocker) -> Iterator[DockerProxy]:
    with DockerProxy(own_engine.host, tcp=True) as proxy:
        yield proxy


def test_a_start_that_the_engine_made_and_then_called_failed_has_happened(
    proxy: DockerProxy, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", proxy.host)
    runtime = bench.open()
    run = bench.run("sleep 1000")
    runtime.create(run)
    with proxy.failing(START):
        runtime.start(run.run_id)
    assert found(runtime, run.run_id).state is ContainerState.RUNNING


def test_a_log_that_the_engine_refuses_to_give_ends_with_its_words(
    bench: Bench, own_engine: PrivateDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudai_agent.docker.LOG_TRY_SECONDS", 0.01)
    runtime = bench.open()
    run_id = started(runtime, bench.run("echo words"))
    eventually("it has ended", lambda: found(runtime, run_id).state is ContainerState.EXITED)
    for logs in own_engine.directory.glob("data/containers/*/local-logs"):
        shutil.rmtree(logs)
        logs.touch()
    text = b"".join(runtime.read_log(run_id, 0)).decode()
    assert text.startswith("\n[cloudai: the engine does not give the rest of the log: ")
    assert "local-logs" in text


def test_a_connection_to_an_engine_elsewhere_is_tried_while_it_is_silent(
    tcp_proxy: DockerProxy, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", tcp_proxy.host)
    runtime = bench.open()
    pieces = runtime.read_log(started(runtime, bench.run("echo words; sleep 1000")), 0)
    assert next(pieces) == b"words\n"
    port = int(tcp_proxy.host.rpartition(":")[2])
    timers = [
        fields[5].partition(":")[0]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if int((fields := line.split())[2].partition(":")[2], 16) == port and fields[3] == ESTABLISHED
    ]
    assert timers
    assert set(timers) == {KEEP_ALIVE}


def test_starts_that_were_cut_off_by_the_engines_death_are_told_as_that(
    bench: Bench, own_engine: PrivateDocker
) -> None:
    runs = [bench.run("sleep 1000", cpu=50) for _ in range(10)]
    runtime = bench.open()
    for run in runs:
        runtime.create(run)
    with ThreadPoolExecutor(len(runs)) as pool:
        starts = [pool.submit(runtime.start, run.run_id) for run in runs]
        eventually("some are being started", lambda: own_engine.shims() > 0)
        own_engine.kill()
        assert all(start.exception() is None or isinstance(start.exception(), EngineDown) for start in starts)
    own_engine.start()
    again = bench.open()
    words = set()
    for run in runs:
        try:
            again.start(run.run_id)
        except RunRefused as refused:
            words.add((refused.reason, refused.message.partition(" (")[0]))
    assert words <= {("StartFailed", "The engine was killed while it started the container")}
