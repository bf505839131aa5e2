"""What the API remembers of Tasks: what is gone stays away, whatever answer is still on its way."""

from __future__ import annotations

from cloudai.store.kube.awaited import Awaited
from cloudai.store.kube.cache import TaskCache
from cloudai.store.kube.revisions import Revisions
from cloudai.store.kube.task_resource import Json


def task(uid: str, version: int) -> Json:
    spec = {"image": "i", "userId": "ann", "resources": {"cpu": "1", "memory": "1Gi"}}
    meta = {"name": "t", "namespace": "here", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": meta | {"creationTimestamp": "2025-11-16T10:30:00Z"}, "spec": spec}


def cache() -> TaskCache:
    return TaskCache(Revisions(), Awaited())


def test_a_late_answer_does_not_bring_back_what_was_deleted() -> None:
    tasks = cache()
    tasks.changed(task("one", 5))
    tasks.deleted(task("one", 7))
    tasks.changed(task("one", 6))
    assert tasks.get("t") is None
    assert sum(tasks.totals().values()) == 0


def test_nor_what_was_deleted_before_anything_else_was_told_of_it() -> None:
    tasks = cache()
    tasks.deleted(task("one", 7))
    tasks.changed(task("one", 5))
    assert tasks.get("t") is None


def test_nor_does_one_of_an_older_task_of_the_same_name_replace_the_new_one() -> None:
    tasks = cache()
    tasks.changed(task("two", 9))
    tasks.changed(task("one", 6))
    assert tasks.uid("t") == "two"
