"""Removes what the retention settings let go: logs, finished tasks, old changes. In batches, so that nobody waits long."""

from __future__ import annotations

import math

from cloudai.settings import Settings
from cloudai.store.protocol import Store

EVERY_SECONDS = 60.0
BATCH = 500
CHANGES_KEPT = 200_000


async def sweep(store: Store, settings: Settings, now: int) -> int:
    """Remove everything that is due at `now` (ms). Returns how many tasks were deleted."""
    if math.isfinite(settings.log_retention_seconds):
        before = now - round(settings.log_retention_seconds * 1000)
        while await store.delete_logs(before, BATCH) == BATCH:
            pass
    deleted = 0
    if math.isfinite(settings.task_retention_seconds):
        before = now - round(settings.task_retention_seconds * 1000)
        while True:
            batch = await store.delete_finished(before, BATCH)
            deleted += batch
            if batch < BATCH:
                break
    await store.prune_changes(CHANGES_KEPT)
    return deleted
