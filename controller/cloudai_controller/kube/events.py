"""Events on a Task, for people who `kubectl describe` it: what went wrong, and what was tried again.

An event is a write, so a task that simply runs has none of ours; its Pod has the scheduler's and the kubelet's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging

from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.resources import Task, TaskStatus
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.task_resource import Json, micros
from cloudai_controller.kube.lease import NotLeading

LONGEST = 1000  # characters of a note
MOST = 64  # on their way at once; where the server is slow, writes of more weight go first and further ones stay untold
log = logging.getLogger("cloudai.operator")


class Events:
    """Events of the Tasks of `namespace`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        self._sending: set[asyncio.Task[None]] = set()

    def status(self, resource: Json, task: Task) -> None:
        """Tell of a status that is worth it, beside the work; one that cannot be told is only logged."""
        if (
            task.reason is None
            or task.status in (TaskStatus.COMPLETED, TaskStatus.RUNNING)
            or len(self._sending) >= MOST
        ):
            return
        normal = task.status is TaskStatus.CANCELLED
        self._tell(resource, "Normal" if normal else "Warning", task.reason, task.message or task.reason)

    def _tell(self, resource: Json, kind: str, reason: str, note: str) -> None:
        meta = resource["metadata"]
        name = hashlib.sha256(f"{meta['uid']} {meta['resourceVersion']} {reason}".encode()).hexdigest()[:16]
        body = {
            "metadata": {"name": f"{meta['name'][:200]}.{name}"},
            "eventTime": micros(now_ms()),
            "reportingController": "cloudai.dev/operator",
            "reportingInstance": "operator",
            "action": "Reconcile",
            "type": kind,
            "reason": reason,
            "note": note[:LONGEST],
            "regarding": {
                "apiVersion": resource["apiVersion"],
                "kind": resource["kind"],
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
        }
        sending = asyncio.ensure_future(self._send(body))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _send(self, body: Json) -> None:
        try:
            await self._api.create(self._path, body)
        except (ApiError, CloudAIError, NotLeading) as error:
            log.debug("an event was not told: %s", error)
