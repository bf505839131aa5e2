"""Removes what the retention settings let go: logs, finished tasks, workers that are gone, old changes. In batches, so that
nobody waits long.
"""

from __future__ import annotations

from cloudai.settings import Settings
from cloudai.store.protocol import Store

EVERY_SECONDS = 60.0
BATCH = 100  # tasks
CHANGES_KEPT = 200_000
WORKER_SECONDS = 86400.0  # that a worker is remembered, at least: one that is switched off for the night is no news


async def sweep(store: Store, settings: Settings, now: int) -> int:
    """Remove everything that is due at `now` (ms). Returns how many tasks were deleted."""
    finished = _before(now, settings.task_retention_seconds)
    while await store.delete_logs(max(finished, _before(now, settings.log_retention_seconds)), BATCH):
        pass
    deleted = 0
    while batch := await store.delete_finished(finished, BATCH):
        deleted += batch
    await store.delete_workers(_before(now, max(settings.task_retention_seconds, WORKER_SECONDS)))
    while await store.prune_changes(CHANGES_KEPT):
        pass
    return deleted


def _before(now: int, kept_seconds: float) -> int:
    """Since when (ms) things are kept; before that time there was nothing where they are kept for ever."""
    return round(max(0.0, now - kept_seconds * 1000))
