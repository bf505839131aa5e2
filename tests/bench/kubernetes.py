"""`python -m tests.bench.kubernetes [NAME …]`: CloudAI on Kubernetes, beside what the same control plane does without it.

One cluster of the tests' own for the whole run, with played nodes on which a pod ends at once: what is measured is what
controllers and API server do. The operator and the API have the chart's own access rights; whoever else takes part has the
cluster's as they come, with its clients' limits raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil

from cloudai.settings import Settings
from cloudai.store.kube.api import Api, connect
from tests.bench import http
from tests.bench.table import HEADER, Row, at_most, rates
from tests.cluster import cluster as clusters
from tests.cluster.binaries import Missing, programs
from tests.cluster.images import SHELL, load_busybox
from tests.e2e.cluster import Cluster, Part, eventually
from tests.kube.access import account
from tests.kube.kube import Json, Kube, Place

NODES = 6
TASKS = 1000
ROUNDS = 3
AT_ONCE = 64
SUBMITTED, LOGGED = 300, 50
HELD, LIVE = 20_000, 5_000
PATIENCE = 600  # seconds, and one more for each task: only a broken system takes as long
GROUP = "/apis/cloudai.dev/v1alpha1"
WISH = {"cpu": "10m", "memory": "16Mi"}
SHORT = {"containers": [{"name": "main", "image": SHELL, "resources": {"requests": WISH, "limits": WISH}}]}


@dataclass(frozen=True)
class Kind:
    """One way to have a command run: where it is made, what is made, and when it is done."""

    path: str
    body: Callable[[str], Json]
    done: Callable[[Json], bool]


def _task(name: str) -> Json:
    spec = {"image": SHELL, "userId": "bench", "resources": WISH}
    return {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "metadata": {"name": name}, "spec": spec}


def _job(name: str) -> Json:
    template = {"spec": {**SHORT, "restartPolicy": "Never"}}
    meta = {"name": name}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {"template": template, "backoffLimit": 0},
    }


def _pod(name: str) -> Json:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {**SHORT, "restartPolicy": "Never"}}


def _complete(job: Json) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(one["type"] == "Complete" and one["status"] == "True" for one in conditions)


KINDS = {
    "Tasks": Kind(GROUP + "/namespaces/{}/tasks", _task, lambda task: _phase(task) == "Completed"),
    "Jobs": Kind("/apis/batch/v1/namespaces/{}/jobs", _job, _complete),
    "Pods": Kind("/api/v1/namespaces/{}/pods", _pod, lambda pod: _phase(pod) == "Succeeded"),
}


def _phase(resource: Json) -> str:
    return str((resource.get("status") or {}).get("phase"))


class Bench:
    """The cluster and the parts of CloudAI that run in it."""

    def __init__(self, kube: Kube, directory: Path) -> None:
        self.kube = kube
        self.directory = directory
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def installed(self, *parts: str, **chosen: str) -> Iterator[tuple[Place, dict[str, Part], int]]:
        """A namespace with these parts, each with its account and the settings `chosen`; and the port of the API."""
        with contextlib.ExitStack() as ends:
            place = Place(self.kube, f"bench-{next(self._numbers)}")
            self.kube.kubectl("create", "namespace", place.name)
            home = self.directory / place.name
            home.mkdir()
            settings = {"CLOUDAI_NAMESPACE": place.name, "CLOUDAI_LOG_LEVEL": "warning"} | chosen
            processes = ends.enter_context(contextlib.closing(Cluster(home, "process", settings)))
            running: dict[str, Part] = {}
            for part in parts:
                name = ends.enter_context(account(self.kube.programs["helm"], place, part))
                own = {"CLOUDAI_KUBECONFIG": str(place.kubeconfig_of(name, home))}
                if part == "operator":
                    running[part] = processes.start("operator", "operator", "--port", "0", **own)
                    eventually("the operator leads", lambda: "leads" in (home / "operator.log").read_text())
                else:
                    port = str(processes.port)
                    running[part] = processes.start("api", "api", "--store", "kubernetes", "--port", port, **own)
                    eventually("the API answers", lambda: processes.answers(running["api"]))
            yield place, running, processes.port

    def rate(self, kind: Kind, place: Place, count: int) -> float:
        """Made and done, per second, from the first request until the last one is done."""
        return count / asyncio.run(self._timed(kind, place, count))

    async def _timed(self, kind: Kind, place: Place, count: int) -> float:
        api = await connect(Settings(kubeconfig=self.kube.kubeconfig))
        try:
            path = kind.path.format(place.name)
            version = (await api.get(path, limit=1))["metadata"]["resourceVersion"]
            began = time.perf_counter()
            async with asyncio.timeout(PATIENCE + count), asyncio.TaskGroup() as group:
                group.create_task(_until_done(api, path, version, kind.done, count))
                await made(api, path, [kind.body(f"one-{number}") for number in range(count)])
            return time.perf_counter() - began
        finally:
            await api.close()

    def emptied(self, place: Place) -> None:
        """Nothing of a round is left to be collected while the next one runs."""
        place.kubectl("delete", "ctask,jobs,pods", "--all", "--wait=false")
        eventually("its pods are gone", lambda: not place.get("pods,ctask,jobs")["items"], patience=300)


async def made(api: Api, path: str, bodies: Sequence[Json]) -> None:
    waiting = iter(bodies)

    async def make() -> None:
        for body in waiting:
            await api.create(path, body)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(make())


async def _until_done(api: Api, path: str, version: str, done: Callable[[Json], bool], count: int) -> None:
    finished: set[str] = set()
    while len(finished) < count:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with api.stream(path, watch="true", resourceVersion=version) as stream:
                async for line in stream:
                    resource: Json = orjson.loads(line)["object"]
                    version = resource["metadata"]["resourceVersion"]
                    if done(resource):
                        finished.add(resource["metadata"]["name"])
                    if len(finished) == count:
                        return


# -- the rows


def tasks(bench: Bench) -> list[Row]:
    """Tasks against Jobs and against bare Pods, in turn."""
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(ROUNDS + 1):
        for name, kind in KINDS.items():
            with bench.installed(*(["operator"] if name == "Tasks" else [])) as (place, _, _):
                rate = bench.rate(kind, place, TASKS if turn else TASKS // 5)
                if turn:  # the first round warms all up
                    found[name].append(rate)
                bench.emptied(place)
    command = "make bench-kubernetes ARGS=tasks"
    return [
        rates(f"{TASKS:,} Tasks done, against batch/v1 Jobs", found["Tasks"], found["Jobs"], 1.5, command),
        rates(f"{TASKS:,} Tasks done, against bare Pods", found["Tasks"], found["Pods"], 0.6, command),
    ]


def writes(bench: Bench) -> list[Row]:
    """What the API server has on record of operator and API, from the first submit until nothing is left to write."""
    command = "make bench-kubernetes ARGS=writes"
    with bench.installed("operator", "api") as (place, _, port):
        plain = _written_for(bench, place, port, "true", SUBMITTED, removed=False)
    kept = {"CLOUDAI_TASK_RETENTION_SECONDS": "20"}
    with on_the_real_node(bench.kube), bench.installed("operator", "api", **kept) as (place, _, port):
        logged = _written_for(bench, place, port, "echo words", LOGGED, removed=True)
    return [
        at_most("API writes a task, operator and API", plain, 7, "", command),
        at_most("the same with a log, until the task is removed", logged, 9, "", command),
    ]


def _written_for(bench: Bench, place: Place, port: int, command: str, count: int, removed: bool) -> float:
    """For each of `count` tasks."""
    body = {"user_id": "bench", "docker_image": SHELL, "req_cpu": 0.01, "req_memory": 0.016, "command": command}
    before = _written(bench.kube, place)
    http.rate(port, [http.post("/api/tasks", orjson.dumps(body))], count)
    if removed:
        eventually("all tasks are removed", lambda: not place.get("ctask")["items"], 300)
    else:
        place.kubectl("wait", "--for=condition=Succeeded", "ctask", "--all", "--timeout=100s")
    eventually("no Pod is held any more", lambda: not any(map(_held, place.pods())))
    written = _written(bench.kube, place) - before
    bench.emptied(place)
    return written / count


@contextlib.contextmanager
def on_the_real_node(kube: Kube) -> Iterator[None]:
    """It takes pods, and no other does: pods of played nodes have no logs."""
    assert kube.own is not None
    load_busybox(kube.own)
    kube.kubectl("cordon", "-l", "type=played")
    kube.kubectl("uncordon", clusters.NODE)
    try:
        yield
    finally:
        kube.kubectl("cordon", clusters.NODE)
        kube.kubectl("uncordon", "-l", "type=played")


def _held(pod: Json) -> bool:
    return bool(pod["metadata"].get("finalizers"))


def _written(kube: Kube, place: Place) -> int:
    """Without the lease, which costs by the second and not by the task."""
    assert kube.own is not None
    accounts, count = f"system:serviceaccount:{place.name}:", 0
    with kube.own.audit.open() as log:
        for line in log:
            event: dict[str, Any] = json.loads(line) if accounts in line else {}
            if event.get("user", {}).get("username", "").startswith(accounts):
                reads = event["verb"] in ("get", "list", "watch")
                count += not reads and event["objectRef"]["resource"] != "leases"
    return count


def reads(bench: Bench) -> list[Row]:
    """`GET /api/tasks/{task_id}` of both stores, in turn."""
    ours, theirs = [], []
    with bench.installed("api") as (place, _, port), http.cloudai() as sqlite:
        asyncio.run(_made_alone(bench, place, http.READ))
        known = [http.get(f"/api/tasks/one-{number}") for number in range(http.READ)]
        others = [http.get(f"/api/tasks/{sqlite.submit(SHELL, 'true')}") for _ in range(http.READ)]
        for turn in range(http.ROUNDS + 1):
            rate = (http.rate(port, known, 4000), http.rate(sqlite.port, others, 4000))
            if turn:
                ours.append(rate[0])
                theirs.append(rate[1])
        bench.emptied(place)
    return [rates("GET /api/tasks/{id} against SQLite's", ours, theirs, 0.9, "make bench-kubernetes ARGS=reads")]


async def _made_alone(bench: Bench, place: Place, count: int) -> None:
    api = await connect(Settings(kubeconfig=bench.kube.kubeconfig))
    try:
        await made(api, KINDS["Tasks"].path.format(place.name), [_task(f"one-{number}") for number in range(count)])
    finally:
        await api.close()


def memory(bench: Bench) -> list[Row]:
    """An operator that has seen so many Tasks end, and looks after the live ones."""
    with bench.installed("operator") as (place, parts, _):
        bench.rate(KINDS["Tasks"], place, HELD - LIVE)
        bench.rate(Kind(KINDS["Tasks"].path, _live, lambda task: _phase(task) == "Running"), place, LIVE)
        held = peak(parts["operator"])
    what = f"operator, {HELD:,} Tasks, {LIVE:,} of them live"
    return [at_most(what, held, 300, "MB", "make bench-kubernetes ARGS=memory")]


def _live(name: str) -> Json:
    """A Task that goes on until it is deleted."""
    task = _task(f"live-{name}")
    task["spec"]["pod"] = {"annotations": {"play.cloudai.dev/end": "never"}}
    return task


def peak(part: Part) -> float:
    """The most memory that the process ever held, in MB."""
    status = Path(f"/proc/{psutil.Process(part.process.pid).pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM"))


ROWS: dict[str, Callable[[Bench], list[Row]]] = {"tasks": tasks, "writes": writes, "reads": reads, "memory": memory}


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Bench]:
    """Nothing but the played nodes takes pods, and they take every pod."""
    built = dict(programs())
    own = clusters.start(directory / "cluster", built, NODES)
    try:
        kube = Kube(own.kubeconfig, built, own)
        kube.prepare()
        kube.kubectl("taint", "node", "-l", "type=played", "played-")
        kube.kubectl("cordon", clusters.NODE)
        yield Bench(kube, directory)
    finally:
        own.stop()


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"no such measurement: {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    met = True
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory)) as bench:
        print(HEADER, flush=True)
        for name in names or ROWS:
            for row in ROWS[name](bench):
                print(row, flush=True)
                met = met and row.met
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Missing as lacking:
        sys.exit(f"bench: {lacking}")
