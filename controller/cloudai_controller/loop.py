"""The controller's loop: follow the changes, read what changed, plan, apply.

`step` is one pass, so that tests drive it without waiting; `run` calls it whenever something changed or is due. Nothing
in memory is needed to be right: on any error it is dropped and read anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cloudai.errors import CloudAIError
from cloudai.resources import Run, Task
from cloudai.settings import Settings
from cloudai.store.protocol import FenceLost, Lease, Pruned, Store
from cloudai_controller import memory, metrics, retention
from cloudai_controller.actions import Action, Place, group
from cloudai_controller.clock import Clock, SystemClock
from cloudai_controller.feed import Feed
from cloudai_controller.journal import record
from cloudai_controller.leader import RENEW_SECONDS, Leadership
from cloudai_controller.plan import plan
from cloudai_controller.state import Terms, View

GROUPS = 500  # in one commit
LONGEST_BACKOFF = 5.0

log = logging.getLogger("cloudai.controller")


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did. `wait`: seconds until the next one is due if nothing changes; None: not before a change."""

    leading: bool
    applied: int
    wait: float | None


class Controller:
    """`holder` names this process among the controllers of the store."""

    def __init__(self, store: Store, settings: Settings, holder: str, clock: Clock | None = None) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock or SystemClock()
        self._terms = terms(settings)
        self._leadership = Leadership(store, holder, self._clock)
        self._wake = asyncio.Event()
        self._view: View | None = None
        self._feed: Feed | None = None
        self._passed_at = 0
        self._refreshed_at = 0

    # -- one pass

    async def step(self) -> Step:
        """Raises what the store raises; the next call starts from a fresh read."""
        self._wake.clear()
        try:
            if not await self._leadership.tick():
                await self.close()
                return Step(False, 0, RENEW_SECONDS)
            # The whole pass is fenced by the lease it began with: this process may lose it meanwhile.
            lease = self._leadership.lease
            assert lease is not None
            return await self._pass(lease)
        except FenceLost:
            self._leadership.lost()
            await self.close()
            return Step(False, 0, RENEW_SECONDS)
        except Pruned:
            await self.close()
            return Step(True, 0, 0)
        except Exception:
            await self.close()
            raise

    async def _pass(self, lease: Lease) -> Step:
        view, feed = await self._current()
        now = self._clock.now()
        if not 0 <= now - self._passed_at <= self._terms.heartbeat:
            view.observe_from(now)
        await memory.read(self._store, view, feed.take(), self._clock)
        fresh = 0 <= now - self._refreshed_at < self._terms.heartbeat // 2
        if not fresh or (view.expiry is not None and now >= view.expiry):
            await memory.refresh(self._store, view, self._clock)
            self._refreshed_at = now
        with metrics.PLAN_SECONDS.time():
            made = plan(view, now)
        view.settle(made.findings)
        applied = await self._apply(view, feed, made.actions, lease)
        metrics.QUEUED.set(view.queued)
        self._passed_at = now
        return Step(True, applied, 0 if applied else self._until_due(view, now))

    async def _current(self) -> tuple[View, Feed]:
        if self._view is None or self._feed is None:
            self._view, revision = await memory.load(self._store, self._terms, self._clock)
            self._feed = Feed(self._store, revision, self._wake)
            self._passed_at = self._refreshed_at = self._view.observing_since
            log.info("%d tasks are active, %d queued", len(self._view.tasks), self._view.queued)
        return self._view, self._feed

    def _until_due(self, view: View, now: int) -> float | None:
        """Heartbeats leave no changes, so while anything is active the workers are looked at now and then."""
        if not view.settled:
            return RENEW_SECONDS  # what was refused even though it was read anew is tried again without haste
        if not view.tasks and not any(view.busy_workers()):
            return None
        due = self._refreshed_at + self._terms.heartbeat // 2
        if view.expiry is not None:
            due = min(due, max(view.expiry, now + 1))
        return max(0.0, (due - now) / 1000)

    async def _apply(self, view: View, feed: Feed, actions: Sequence[Action], lease: Lease) -> int:
        applied = 0
        for start in range(0, len(actions), GROUPS):
            applied += await self._commit(view, feed, actions[start : start + GROUPS], lease)
        return applied

    async def _commit(self, view: View, feed: Feed, actions: Sequence[Action], lease: Lease) -> int:
        groups = [group(action) for action in actions]
        committed = await self._store.commit(groups, lease)
        feed.own(committed)
        refused: list[tuple[Task | Run, ...]] = []
        for action, planned, done, stored in zip(actions, groups, committed.applied, committed.objects, strict=True):
            if done:
                _put(view, stored)
                record(action)
            else:
                refused.append(planned)
                if isinstance(action, Place):
                    view.reconsider(action.worker_id)
        if refused:
            metrics.REFUSED.inc(len(refused))
            await memory.read(self._store, view, memory.keys_of(refused), self._clock)
        return len(actions) - len(refused)

    # -- for ever

    async def run(self, stop: asyncio.Event) -> None:
        """Pass after pass until `stop`, whatever the store does meanwhile; then let another controller lead."""
        beside = [asyncio.create_task(self._keep_leading()), asyncio.create_task(self._retain())]
        stopped = asyncio.create_task(stop.wait())
        try:
            await self._passes(stop, stopped)
        finally:
            for task in (*beside, stopped):
                task.cancel()
            await asyncio.gather(*beside, stopped, return_exceptions=True)
            await self.close()
            with contextlib.suppress(CloudAIError):
                await self._leadership.release()

    async def _passes(self, stop: asyncio.Event, stopped: asyncio.Task[bool]) -> None:
        failures = 0
        while not stop.is_set():
            try:
                wait = (await self.step()).wait
                if failures:
                    log.info("the store answers again")
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, the next pass starts from a fresh read
                failures += 1
                metrics.ERRORS.inc()
                _complain(error, failures)
                await asyncio.wait([stopped], timeout=_backoff(failures))
                continue
            if wait == 0:
                await asyncio.sleep(0)
                continue
            woken = asyncio.create_task(self._wake.wait())
            await asyncio.wait([woken, stopped], timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()

    async def close(self) -> None:
        """Drop what is in memory; the next pass reads it anew."""
        feed, self._feed, self._view = self._feed, None, None
        if feed is not None:
            await feed.close()

    async def _keep_leading(self) -> None:
        """Renew the lease also while a pass takes long or nothing happens."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            if self._leadership.lease is None:
                continue  # a follower's passes apply for it
            try:
                if not await self._leadership.tick():
                    self._wake.set()
            except CloudAIError:
                log.debug("the lease could not be renewed", exc_info=True)
            except Exception:
                log.exception("the lease could not be renewed")

    async def _retain(self) -> None:
        while True:
            await asyncio.sleep(retention.EVERY_SECONDS)
            if self._leadership.lease is None:
                continue
            try:
                deleted = await retention.sweep(self._store, self._settings, self._clock.now())
                if deleted:
                    log.info("%d finished tasks were deleted by retention", deleted)
            except Exception:
                log.exception("retention could not be applied and is tried again later")


def terms(settings: Settings) -> Terms:
    """The rules of time, from the settings."""
    lease = round(settings.lease_seconds * 1000) if math.isfinite(settings.lease_seconds) else None
    return Terms(settings.heartbeat_ms, lease, round(settings.stop_grace_seconds * 1000))


def _put(view: View, stored: Sequence[Task | Run]) -> None:
    for item in stored:
        if isinstance(item, Task):
            view.put_task(item)
        else:
            view.put_run(item)


def _complain(error: Exception, failures: int) -> None:
    if not isinstance(error, CloudAIError):
        log.exception("a pass failed and is tried again", exc_info=error)
    elif failures == 1:
        log.warning("the store does not answer, trying on: %s", error)


def _backoff(failures: int) -> float:
    """Seconds to wait after that many failures in a row: longer each time, and not the same for every controller."""
    longest = min(LONGEST_BACKOFF, 0.1 * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1.0)
