"""What the controller tells Prometheus; served by whoever shares its process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

PLACEMENTS = Counter("cloudai_controller_placements", "Attempts placed on workers.")
ACTIONS = Counter(
    "cloudai_controller_actions", "Actions stored, by kind; on Kubernetes statuses, by status.", ["action"]
)
REFUSED = Counter("cloudai_controller_commits_refused", "Actions refused because their facts had changed.")
LOST = Counter("cloudai_controller_runs_lost", "Attempts given up because their worker was lost.")
ERRORS = Counter(
    "cloudai_controller_errors", "Passes, on Kubernetes looks, that ended in an error and were tried again."
)
QUEUED = Gauge("cloudai_controller_queued_tasks", "Tasks that wait for room.")
LOOKS = Gauge("cloudai_operator_waiting_looks", "On Kubernetes: tasks that changed and wait for the operator's look.")
LEADING = Gauge("cloudai_controller_leading", "1 while this process leads, else 0.")
PLAN_SECONDS = Histogram(
    "cloudai_controller_plan_seconds",
    "Time to make one plan; on Kubernetes of one task.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
