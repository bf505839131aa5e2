"""What keeps the store small and its leader single: leases, tokens, retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloudai.store import rows
from cloudai.store.protocol import Kind, Lease
from cloudai.store.transaction import Transaction


@dataclass(frozen=True, slots=True)
class PutLease:
    lease: Lease
    expected_version: int


@dataclass(frozen=True, slots=True)
class Token:
    digest: bytes
    name: str
    now: int


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
        transaction.run(sql, (token.digest, token.name, token.now))
    return [None] * len(tokens)


def delete_finished(transaction: Transaction, batches: Sequence[Finished]) -> list[int | Exception]:
    """Delete finished tasks, oldest end first, with their runs and logs; how many went."""
    return [_delete_finished(transaction, batch) for batch in batches]


def _delete_finished(transaction: Transaction, batch: Finished) -> int:
    sql = (
        "SELECT id, user_id, status FROM tasks"
        " WHERE finished_at IS NOT NULL AND finished_at < ? ORDER BY finished_at LIMIT ?"
    )
    found = transaction.all(sql, (batch.before, batch.limit))
    keys = [(row[0],) for row in found]
    transaction.many("DELETE FROM logs WHERE task_id = ?", keys)
    transaction.many("DELETE FROM runs WHERE task_id = ?", keys)
    transaction.many("DELETE FROM tasks WHERE id = ?", keys)
    for key, user_id, status in found:
        transaction.count(user_id, status, None)
        transaction.change(Kind.TASK, rows.task_id(key), "deleted")
    return len(found)


def delete_logs(transaction: Transaction, batches: Sequence[Finished]) -> list[int | Exception]:
    """Remove the logs of finished tasks, oldest end first; how many tasks lost theirs."""
    return [_delete_logs(transaction, batch) for batch in batches]


def _delete_logs(transaction: Transaction, batch: Finished) -> int:
    sql = (
        "SELECT id FROM tasks"
        " WHERE finished_at IS NOT NULL AND NOT logs_removed AND finished_at < ? ORDER BY finished_at LIMIT ?"
    )
    keys = [(row[0],) for row in transaction.all(sql, (batch.before, batch.limit))]
    transaction.many("DELETE FROM logs WHERE task_id = ?", keys)
    transaction.many("UPDATE tasks SET logs_removed = true WHERE id = ?", keys)
    return len(keys)


def prune_changes(transaction: Transaction, keeps: Sequence[int]) -> list[Exception | None]:
    """Keep the last so many changes of the log."""
    for keep in keeps:
        transaction.run("DELETE FROM changes WHERE revision <= ?", (transaction.revision - keep,))
    return [None] * len(keeps)


def touch(transaction: Transaction, times: Sequence[int]) -> list[Exception | None]:
    """A write that changes nothing anybody reads: it succeeds where writing is possible."""
    sql = "INSERT INTO meta (name, value) VALUES ('ping', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    transaction.run(sql, (str(times[-1]),))
    return [None] * len(times)
