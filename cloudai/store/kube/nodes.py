"""A Node as a Worker, with what all pods on it hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cloudai.resources import NOTHING, Resources, Worker, WorkerState
from cloudai.store.kube import quantity
from cloudai.store.kube.pods import GPU, Held, amount_of
from cloudai.store.kube.task_resource import millis

KUBELET_PORT = 10250


def worker_of(
    node: Mapping[str, Any], heard_at: int | None, silent: bool, usage: Mapping[str, str] | None, gpu: str = GPU
) -> Worker:
    """`heard_at`: when the node's Lease was renewed, in ms by the node's clock, which tells not whether the node is `silent`;
    `usage`: what metrics.k8s.io says, None where nothing does.
    """
    meta, status = node["metadata"], node.get("status") or {}
    capacity = amount_of(status.get("allocatable") or {}, gpu)
    registered = millis(meta["creationTimestamp"]) or 0
    problem = _problem(node)
    return Worker(
        worker_id=meta["name"],
        identity=meta["uid"],
        address=_address(status),
        capacity=capacity,
        runtime="kubernetes",
        registered_at=registered,
        last_heartbeat=heard_at if heard_at is not None else registered,
        ready=problem is None,
        problem=problem,
        cpu_usage=_percent(usage, "cpu", capacity.cpu / 1000),
        memory_usage=_percent(usage, "memory", capacity.memory),
        silent=silent,
    )


def _problem(node: Mapping[str, Any]) -> str | None:
    if node["spec"].get("unschedulable"):
        return "The node is cordoned: `kubectl uncordon` lets new tasks start there."
    for condition in (node.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Ready":
            if condition["status"] == "True":
                return None
            return f"The node is not ready: {condition.get('message') or condition.get('reason') or 'it says no more'}"
    return "The node has not reported yet."


def _address(status: Mapping[str, Any]) -> str:
    port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port", KUBELET_PORT)
    known = {one["type"]: one["address"] for one in status.get("addresses") or []}
    host = known.get("InternalIP") or known.get("Hostname") or ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _percent(usage: Mapping[str, str] | None, name: str, of: float) -> float | None:
    if usage is None or name not in usage or of <= 0:
        return None
    return round(float(quantity.parse(usage[name])) / of * 100, 1)


def state_of(worker: Worker, pods: Iterable[Held]) -> WorkerState:
    """Allocated is what the pods hold, foreign ones too; `runs` counts ours that live."""
    allocated, runs = NOTHING, 0
    for one in pods:
        allocated += one.amount
        runs += one.run is not None and not one.run.phase.terminal
    taken = min(allocated.gpu, worker.capacity.gpu) // 1000
    return WorkerState(
        worker=worker,
        allocated=_within(allocated, worker.capacity),
        runs=runs,
        gpu_free=(0,) * taken + (1000,) * (worker.gpu_devices - taken),
    )


def _within(amount: Resources, capacity: Resources) -> Resources:
    """A node whose allocatable shrank, or with pods that the scheduler did not place, is full, not more than full."""
    return Resources(
        min(amount.cpu, capacity.cpu),
        min(amount.memory, capacity.memory),
        min(amount.storage, capacity.storage),
        min(amount.gpu, capacity.gpu),
    )
