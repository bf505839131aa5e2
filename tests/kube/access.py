"""The chart's access rights, given to accounts in a namespace of a real cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.kube.kube import Json, Place
from tests.kube.test_chart import rendered

KINDS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
FOR_PEOPLE = ("view", "edit")  # roles that the parts themselves do not use
TRIES = 200  # of which the first or second is enough


def rights(helm: Path, place: Place, part: str, release: str) -> list[Json]:
    """What the chart renders for `part` (operator or api)."""
    found = rendered(helm, "--set", f"tasks.namespace={place.name}", release=release, namespace=place.name)
    names = tuple(f"{release}-{name}" for name in (part, *FOR_PEOPLE))
    return [one for one in found if one["kind"] in KINDS and one["metadata"]["name"].endswith(names)]


def rules(objects: list[Json]) -> list[tuple[Json, Json]]:
    """Every rule with the role that has it, but for the roles meant for people."""
    return [(role, rule) for role in objects if not _for_people(role) for rule in role.get("rules", ())]


def _for_people(role: Json) -> bool:
    return str(role["metadata"]["name"]).endswith(FOR_PEOPLE)


@contextlib.contextmanager
def account(
    helm: Path, place: Place, part: str, release: str | None = None, without: int | None = None
) -> Iterator[str]:
    """The name of an account with the rights of `part`, but for rule number `without`."""
    release = release or f"{place.name}-r"
    objects = rights(helm, place, part, release)
    if without is not None:
        role, rule = rules(objects)[without]
        role["rules"].remove(rule)
    given = {"apiVersion": "v1", "kind": "List", "items": objects}
    place.kube.kubectl("apply", "-f", "-", given=given)
    try:
        name = f"{release}-{part}"
        _settled(place, name, objects)
        yield name
    finally:
        place.kube.kubectl("delete", "--ignore-not-found", "-f", "-", given=given)


def _settled(place: Place, name: str, objects: list[Json]) -> None:
    """Return when the API server has taken in the account's rights, of which it hears role by role."""
    user = f"system:serviceaccount:{place.name}:{name}"
    firsts = [(role, role["rules"][0]) for role in objects if role.get("rules") and not _for_people(role)]
    until_allowed(
        place,
        [
            review(
                user,
                role["metadata"].get("namespace", ""),
                rule["verbs"][0],
                rule["apiGroups"][0],
                rule["resources"][0],
            )
            for role, rule in firsts
        ],
    )


def until_allowed(place: Place, reviews: list[Json]) -> None:
    """Nothing can be waited for here: the API server has rights in a cache of its own, and tells when it is asked. Each time
    that takes a run of kubectl, so this does not spin."""
    given = {"apiVersion": "v1", "kind": "List", "items": reviews}
    for _ in range(TRIES):
        told = place.kube.kubectl("create", "-f", "-", "-o", "jsonpath={.status.allowed} ", given=given)
        if told.split() == ["true"] * len(reviews):
            return
    raise AssertionError(f"not allowed: {told} of {reviews}")


def review(user: str, namespace: str, verb: str, group: str, resource: str, name: str = "") -> Json:
    """The question whether `user` may do that; with an empty namespace, in all of them."""
    asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "name": name}
    spec = {"user": user, "resourceAttributes": asked}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
