"""Images for the real node: made from this machine's own static busybox, and carried into containerd's store."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile

from scripts.demo_image import BUSYBOX, is_static, root_of_busybox
from tests.cluster.binaries import Missing
from tests.cluster.cluster import Cluster

PAUSE = "cloudai.test/pause:1"  # keeps a pod's namespaces; named in containerd's configuration
SHELL = "docker.io/library/busybox:1.36"  # what the samples name, too; another cluster fetches it


def load_busybox(cluster: Cluster) -> None:
    """Both images. Raises Missing where there is no static busybox."""
    if not is_static(BUSYBOX):
        raise Missing("a static busybox: apt-get install busybox-static")
    root = root_of_busybox()
    load(cluster, _archive(PAUSE, root, ["sleep", "2147483647"]))
    load(cluster, _archive(SHELL, root, ["sh"]))


def load(cluster: Cluster, archive: bytes) -> str:
    """Import what `docker save` would write; returns what containerd says of it."""
    command = cluster.inside("ctr", "-n", "k8s.io", "images", "import", "-")
    done = subprocess.run(command, input=archive, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ctr images import: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


def _archive(name: str, layer: bytes, command: list[str]) -> bytes:
    """An image of one layer in the form of `docker save`."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, data in (
            ("manifest.json", json.dumps(manifest).encode()),
            ("config.json", config),
            ("layer.tar", layer),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()
