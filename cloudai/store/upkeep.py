"""What keeps the store small and its leader single: leases, tokens, retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloudai.store import rows
from cloudai.store.protocol import Kind, Lease, Token
from cloudai.store.tables import LIVE_RUNS
from cloudai.store.transaction import Transaction

# In one transaction, for which everybody else who writes waits.
LOG_BYTES = 1024 * 1024
LOG_PIECES = 1000
CHANGES = 5000
HALF_REMOVED = "half_removed_log"  # in `meta`: the task of which more is to go


@dataclass(frozen=True, slots=True)
class PutLease:
    lease: Lease
    expected_version: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Tasks that finished before `before` (ms), at most `limit` of them."""

    before: int
    limit: int


def put_lease(transaction: Transaction, puts: Sequence[PutLease]) -> list[bool | Exception]:
    return [_put_lease(transaction, put.lease, put.expected_version) for put in puts]


def _put_lease(transaction: Transaction, lease: Lease, expected: int) -> bool:
    state = (lease.holder, lease.epoch, expected + 1)
    if expected:
        sql = "UPDATE leases SET holder = ?, epoch = ?, version = ? WHERE name = ? AND version = ?"
        return transaction.run(sql, (*state, lease.name, expected)) == 1
    sql = "INSERT INTO leases (holder, epoch, version, name) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO NOTHING"
    return transaction.run(sql, (*state, lease.name)) == 1


def add_token(transaction: Transaction, tokens: Sequence[Token]) -> list[Exception | None]:
    for token in tokens:
        sql = "INSERT INTO tokens (digest, name, created_at) VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING"
        transaction.run(sql, (token.digest, token.name, token.created_at))
    return [None] * len(tokens)


def remove_token(transaction: Transaction, digests: Sequence[bytes]) -> list[bool | Exception]:
    """Whether each was there."""
    return [transaction.run("DELETE FROM tokens WHERE digest = ?", (digest,)) == 1 for digest in digests]


def delete_finished(transaction: Transaction, batches: Sequence[Finished]) -> list[int | Exception]:
    """Delete finished tasks whose logs were removed, oldest end first, with their runs; how many went."""
    return [_delete_finished(transaction, batch) for batch in batches]


def _delete_finished(transaction: Transaction, batch: Finished) -> int:
    sql = (
        "SELECT id, user_id, status, logs_removed FROM tasks"
        " WHERE finished_at IS NOT NULL AND finished_at < ? ORDER BY finished_at LIMIT ?"
    )
    found = [row[:3] for row in transaction.all(sql, (batch.before, batch.limit)) if row[3]]
    keys = [(row[0],) for row in found]
    transaction.many("DELETE FROM logs WHERE task_id = ?", keys)  # what an agent sent after they had been removed
    transaction.many("DELETE FROM runs WHERE task_id = ?", keys)
    transaction.many("DELETE FROM tasks WHERE id = ?", keys)
    for key, user_id, status in found:
        transaction.count(user_id, status, None)
        transaction.change(Kind.TASK, rows.task_id(key), "deleted")
    return len(found)


def delete_logs(transaction: Transaction, batches: Sequence[Finished]) -> list[int | Exception]:
    """Remove logs of finished tasks, oldest end first, LOG_BYTES at a time; how many tasks' logs that was, or a part of."""
    return [_delete_logs(transaction, batch) for batch in batches]


def _delete_logs(transaction: Transaction, batch: Finished) -> int:
    """A log cannot be read once its first piece is gone. One that is left half removed is noted, and goes on first."""
    begun = transaction.one("SELECT value FROM meta WHERE name = ?", (HALF_REMOVED,))
    sql = (
        "SELECT id FROM tasks"
        " WHERE finished_at IS NOT NULL AND NOT logs_removed AND finished_at < ? ORDER BY finished_at LIMIT ?"
    )
    due = [row[0] for row in transaction.all(sql, (batch.before, batch.limit - bool(begun)))]
    pieces, keys, half = _pieces(transaction, [int(begun[0]), *due] if begun else due)
    transaction.many('DELETE FROM logs WHERE task_id = ? AND attempt = ? AND "end" = ?', pieces)
    transaction.many("UPDATE tasks SET logs_removed = true WHERE id = ?", [(key,) for key in keys])
    if begun:
        transaction.run("DELETE FROM meta WHERE name = ?", (HALF_REMOVED,))
    if half:
        transaction.run("INSERT INTO meta (name, value) VALUES (?, ?)", (HALF_REMOVED, str(keys[-1])))
    return len(keys)


def _pieces(transaction: Transaction, keys: Sequence[int]) -> tuple[list[tuple[int, int, int]], Sequence[int], bool]:
    """As much of the tasks' logs as may go at once, the tasks that are begun with, and whether the last has more."""
    pieces: list[tuple[int, int, int]] = []
    size = 0
    for number, key in enumerate(keys, 1):
        sql = 'SELECT attempt, "end", length(data) FROM logs WHERE task_id = ? LIMIT ?'
        for attempt, end, length in transaction.all(sql, (key, LOG_PIECES + 1)):
            if pieces and (size + length > LOG_BYTES or len(pieces) == LOG_PIECES):
                return pieces, keys[:number], True
            pieces.append((key, attempt, end))
            size += length
    return pieces, keys, False


def delete_workers(transaction: Transaction, befores: Sequence[int]) -> list[int | Exception]:
    """Forget workers that were heard of last before a time (ms) and hold nothing; how many went."""
    return [_delete_workers(transaction, before) for before in befores]


def _delete_workers(transaction: Transaction, before: int) -> int:
    held = f"SELECT 1 FROM runs WHERE runs.worker_id = workers.worker_id AND {LIVE_RUNS}"
    sql = f"SELECT worker_id FROM workers WHERE last_heartbeat < ? AND NOT EXISTS ({held})"
    gone = [row[0] for row in transaction.all(sql, (before,))]
    transaction.many("DELETE FROM workers WHERE worker_id = ?", [(worker_id,) for worker_id in gone])
    for worker_id in gone:
        transaction.change(Kind.WORKER, worker_id, "deleted")
    return len(gone)


def prune_changes(transaction: Transaction, keeps: Sequence[int]) -> list[int | Exception]:
    """Remove the oldest changes, CHANGES at a time, until that many are left; how many went."""
    outcomes: list[int | Exception] = []
    for keep in keeps:
        first = transaction.one("SELECT min(revision) FROM changes")[0] or 0
        last = min(transaction.revision - keep, first + CHANGES - 1)
        outcomes.append(transaction.run("DELETE FROM changes WHERE revision <= ?", (last,)))
    return outcomes


def touch(transaction: Transaction, times: Sequence[int]) -> list[Exception | None]:
    """A write that changes nothing anybody reads: it succeeds where writing is possible."""
    sql = "INSERT INTO meta (name, value) VALUES ('ping', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    transaction.run(sql, (str(times[-1]),))
    return [None] * len(times)
