"""What the API counts for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cloudai.resources import TaskStatus, WorkerState

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


# A method that a client made up must not become a label of its own.
_METHODS = {name: name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}


class Requests(Collector):
    """Counts and times requests by the pattern of their path. Belongs to one event loop, so it needs none of the locks
    that the library's own counters take each time.
    """

    def __init__(self) -> None:
        self._answered: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._times: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS) + 1))
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        self._answered[_METHODS.get(method, "other"), path, status] += 1
        self._times[path][bisect_left(_BUCKETS, seconds)] += 1
        self._seconds[path] += seconds

    def collect(self) -> Iterator[Metric]:
        counts = CounterMetricFamily("cloudai_http_requests", "Requests answered.", labels=["method", "path", "status"])
        for (method, path, status), count in self._answered.items():
            counts.add_metric([method, path, str(status)], count)
        yield counts
        about = "Time until the answer was sent, streams and held-back answers included."
        times = HistogramMetricFamily("cloudai_http_request_seconds", about, labels=["path"])
        for path, counted in self._times.items():
            bounds = [*map(floatToGoString, _BUCKETS), "+Inf"]
            times.add_metric([path], list(zip(bounds, accumulate(counted), strict=True)), self._seconds[path])
        yield times


class Metrics:
    """One registry a facade: several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Requests()
        self.registry.register(self.requests)
        self.websockets = Gauge("cloudai_telemetry_clients", "Telemetry WebSockets open now.", registry=self.registry)
        self.dropped = Counter(
            "cloudai_telemetry_dropped_total", "Telemetry clients dropped as too slow.", registry=self.registry
        )
        self.store_up = Gauge("cloudai_store_up", "1 while the store answers.", registry=self.registry)
        self.tasks = Gauge("cloudai_tasks", "Tasks by status.", ["status"], registry=self.registry)
        self.workers = Gauge("cloudai_workers", "Workers by state.", ["state"], registry=self.registry)

    def observe_store(
        self, workers: Iterable[WorkerState], totals: Mapping[TaskStatus, int], now: int, heartbeat_ms: int
    ) -> None:
        states = [state.worker.active(now, heartbeat_ms) for state in workers]
        self.workers.labels("active").set(sum(states))
        self.workers.labels("inactive").set(len(states) - sum(states))
        for status in TaskStatus:
            self.tasks.labels(status.value).set(totals.get(status, 0))
        self.store_up.set(1)

    def text(self) -> bytes:
        """Also what this process tells of itself, and what a controller in it does."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)
