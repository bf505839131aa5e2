"""What the API counts for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cloudai.resources import TaskStatus, WorkerState

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """One registry a facade: several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cloudai_http_requests_total", "Requests answered.", ["method", "path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "cloudai_http_request_seconds",
            "Time until the answer was sent, streams and held-back answers included.",
            ["path"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.websockets = Gauge("cloudai_telemetry_clients", "Telemetry WebSockets open now.", registry=self.registry)
        self.dropped = Counter(
            "cloudai_telemetry_dropped_total", "Telemetry clients dropped as too slow.", registry=self.registry
        )
        self.store_up = Gauge("cloudai_store_up", "1 while the store answers.", registry=self.registry)
        self.tasks = Gauge("cloudai_tasks", "Tasks by status.", ["status"], registry=self.registry)
        self.workers = Gauge("cloudai_workers", "Workers by state.", ["state"], registry=self.registry)
        self._counter = lru_cache(maxsize=1024)(self.requests.labels)
        self._timer = lru_cache(maxsize=256)(self.seconds.labels)

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

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count and time one request by the pattern of its path."""
        self._counter(_METHODS.get(method, "other"), path, str(status)).inc()
        self._timer(path).observe(seconds)


# A method that a client made up must not become a label of its own.
_METHODS = {name: name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
