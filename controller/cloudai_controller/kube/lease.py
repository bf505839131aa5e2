"""One operator leads: a Lease of our own, compared by its version, that the holder stops acting on before it runs out.

Who waits does not trust clocks of others: a Lease counts as expired when it has not changed for long enough by the waiter's
own clock. https://kubernetes.io/docs/concepts/architecture/leases/

Seconds after a renewal was asked for: until 10 the holder begins writes, by 12 the last one is given up, from 13 on a waiter
takes over, and by 14 one has; the second that is left is for what its requests take.
"""

from __future__ import annotations

import asyncio
import logging

from cloudai.errors import CloudAIError
from cloudai.store.kube.api import Api, ApiError
from cloudai.store.kube.task_resource import Json, micros
from cloudai_controller.clock import Clock, SystemClock

DURATION = 15  # seconds within which another one leads after the last renewal
MARGIN = 5.0  # the holder begins nothing any more this much earlier
LAST_WRITE = 3.0  # what it began has come to its end this much earlier
EARLIER = 2.0  # a waiter takes the Lease this much earlier: a renewal, and that there was none, it sees up to LOOK late
RENEW = 3.0
LOOK = 0.5
AGAIN = 0.5  # after a try that failed
ONE_TRY = 4.0  # of a server that does not answer there must be time to ask another one

log = logging.getLogger("cloudai.operator")


class NotLeading(Exception):
    """The lease is over; whatever is left is another operator's business."""


class Leader:
    """`acquire`, then `keep` beside the work; `check` before each write."""

    def __init__(self, api: Api, namespace: str, holder: str, clock: Clock | None = None) -> None:
        self._api = api.bound(one_try=ONE_TRY, patience=ONE_TRY)
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = "cloudai-controller"
        self._holder = holder
        self._clock = clock or SystemClock()
        self._held: Json | None = None  # the lease as this process wrote it last
        self._until = float("-inf")
        self._seen: tuple[str, float] = ("", 0.0)
        self._heard_at = float("-inf")
        self.trouble = ""  # why the lease could not be read or written when that was tried last

    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._clock.elapsed() < self._until

    def silent(self) -> float:
        """Seconds since the API server said last what the lease is."""
        return self._clock.elapsed() - self._heard_at

    def check(self) -> float:
        """The seconds that a write may take, sent now. Raises NotLeading."""
        if not self.leads():
            raise NotLeading
        return self._until + MARGIN - LAST_WRITE - self._clock.elapsed()

    async def acquire(self) -> None:
        """Returns once this process leads."""
        waited = False
        while not await self._try():
            if not waited and not self.trouble:
                log.info("another operator leads; waiting for its lease to end")
                waited = True
            await asyncio.sleep(LOOK)

    async def keep(self) -> None:
        """Renew for as long as that succeeds; returns when the lease is lost."""
        while self.leads():
            await asyncio.sleep(RENEW if self._held is not None else AGAIN)
            await self._try()

    async def release(self) -> None:
        """Let another one lead at once."""
        if self._held is None or not self.leads():
            return
        self._until = float("-inf")
        body = {
            "metadata": {"resourceVersion": self._held["metadata"]["resourceVersion"]},
            "spec": {"holderIdentity": "", "leaseDurationSeconds": 1},
        }
        try:
            await self._api.patch(f"{self._collection}/{self._name}", body)
        except (ApiError, CloudAIError) as error:
            log.debug("the lease could not be released: %s", error)

    async def _try(self) -> bool:
        asked_at = self._clock.elapsed()
        held, self._held = self._held, None  # after a fault, what is stored is asked for
        try:
            lease = held or await self._stored()
            if lease is None:
                stored = await self._api.create(self._collection, self._lease(None))
            elif self._may_take(lease):
                stored = await self._api.patch(f"{self._collection}/{self._name}", self._lease(lease))
            else:
                self._until = float("-inf")
                self._heard()
                return False
        except (ApiError, CloudAIError) as error:
            if isinstance(error, ApiError) and error.status == 409:
                return self.leads()  # somebody was faster; the next look tells who
            if str(error) != self.trouble:
                log.warning("the lease cannot be had: %s", error)
            self.trouble = str(error)
            return self.leads()
        self._heard()
        self._held = stored
        self._until = asked_at + DURATION - MARGIN
        return True

    def _heard(self) -> None:
        self._heard_at, self.trouble = self._clock.elapsed(), ""

    async def _stored(self) -> Json | None:
        try:
            return await self._api.get(f"{self._collection}/{self._name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _may_take(self, lease: Json) -> bool:
        version, holder = lease["metadata"]["resourceVersion"], lease["spec"].get("holderIdentity")
        if holder in (self._holder, "", None):
            return True
        if version != self._seen[0]:
            self._seen = (version, self._clock.elapsed())
        lasts = float(lease["spec"].get("leaseDurationSeconds") or DURATION)
        return self._clock.elapsed() - self._seen[1] > lasts - EARLIER

    def _lease(self, before: Json | None) -> Json:
        now = micros(self._clock.now())
        spec: Json = {"holderIdentity": self._holder, "leaseDurationSeconds": DURATION, "renewTime": now}
        meta: Json = {"name": self._name}
        mine = before is not None and before["spec"].get("holderIdentity") == self._holder
        if before is not None:
            meta["resourceVersion"] = before["metadata"]["resourceVersion"]
        if not mine:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = (before["spec"].get("leaseTransitions") or 0) + 1 if before is not None else 0
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
