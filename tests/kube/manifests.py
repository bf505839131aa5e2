"""`make manifests`: what the chart renders with its own values, for those who install without Helm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.binaries import Missing, programs
from tests.kube.kube import ROOT

DIRECTORY = ROOT / "manifests"
RBAC = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
LABELS = ("app.kubernetes.io/managed-by", "helm.sh/chart")  # of Helm's own


def manifests(helm: Path) -> Mapping[Path, str]:
    """Text by path. CRD, access rights, everything else."""
    command = [
        str(helm),
        "template",
        "cloudai",
        str(ROOT / "charts" / "cloudai"),
        "-n",
        "cloudai-system",
        "--skip-tests",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rights: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for one in yaml.safe_load_all(text):
        if not one or one["kind"] == "CustomResourceDefinition":
            continue
        for label in LABELS:
            one["metadata"]["labels"].pop(label, None)
        (rights if one["kind"] in RBAC else rest).append(one)
    head = "# Made by `make manifests` from charts/cloudai.\n"
    files = {"rbac/rbac.yaml": rights, "cloudai.yaml": [_namespace(), *rest]}
    return {DIRECTORY / name: head + yaml.safe_dump_all(objects, sort_keys=False) for name, objects in files.items()}


def _namespace() -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cloudai-system"}}


if __name__ == "__main__":
    try:
        made = manifests(programs("helm")["helm"])
    except Missing as missing:
        sys.exit(str(missing))
    for path, content in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
