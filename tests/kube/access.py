"""The chart's access rights, given to accounts in a namespace of a real cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.kube.kube import PATIENCE, Json, Place
from tests.kube.test_chart import rendered

KINDS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
FOR_PEOPLE = ("view", "edit")  # roles that the parts themselves do not use
# The last right of each part that the API server gets to know of.
LAST = {"operator": ("create", "leases.coordination.k8s.io"), "api": ("list", "nodes")}


def rights(helm: Path, place: Place, part: str, release: str) -> list[Json]:
    """What the chart renders for `part` (operator or api)."""
    found = rendered(helm, "--set", f"tasks.namespace={place.name}", release=release, namespace=place.name)
    names = tuple(f"{release}-{name}" for name in (part, *FOR_PEOPLE))
    return [one for one in found if one["kind"] in KINDS and one["metadata"]["name"].endswith(names)]


def rules(objects: list[Json]) -> list[tuple[Json, Json]]:
    """Every rule with the role that has it, but for the roles meant for people."""
    roles = [one for one in objects if "rules" in one and not one["metadata"]["name"].endswith(FOR_PEOPLE)]
    return [(role, rule) for role in roles for rule in role["rules"]]


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
        if without is None:
            _settled(place, name, *LAST[part])
        yield name
    finally:
        place.kube.kubectl("delete", "--ignore-not-found", "-f", "-", given=given)


def _settled(place: Place, name: str, *may: str) -> None:
    """Return when the API server has taken in the account's rights."""
    who = f"--as=system:serviceaccount:{place.name}:{name}"
    for _ in range(PATIENCE):
        if place.kubectl("auth", "can-i", *may, who, check=False).strip() == "yes":
            return
    raise AssertionError(f"{name} may not {' '.join(may)}")
