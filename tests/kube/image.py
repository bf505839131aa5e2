"""The project's own image, built by its Dockerfile on a base of Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.cluster.binaries import cache
from tests.kube.kube import ROOT

NAME = "cloudai.test/cloudai"
TAG = "test"
BASE = "cloudai.test/debian:12"
PACKAGES = "python3,python3-venv,ca-certificates"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def build(docker_host: str) -> bytes:
    """The image as `docker save` gives it. What Debian has is fetched once and kept."""
    environment = os.environ | {"DOCKER_HOST": docker_host, "DOCKER_BUILDKIT": "0"}
    with _debian().open("rb") as root:
        subprocess.run(["docker", "import", "-", BASE], env=environment, stdin=root, check=True, capture_output=True)
    command = ["docker", "build", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE}", "-t", f"{NAME}:{TAG}", "."]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    save = ["docker", "save", f"{NAME}:{TAG}"]
    return subprocess.run(save, env=environment, check=True, capture_output=True).stdout


def _debian() -> Path:
    """A root file system with Python, and with the authorities that this machine trusts, as a tar file."""
    kept = cache() / "debian-12-python.tar"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(".root")
    shutil.rmtree(scratch, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    if AUTHORITIES.exists():
        shutil.copy(AUTHORITIES, scratch / AUTHORITIES.relative_to("/"))
    fresh = kept.with_suffix(".new")
    subprocess.run(["tar", "-C", str(scratch), "-cf", str(fresh), "."], check=True)
    fresh.rename(kept)
    shutil.rmtree(scratch)
    return kept
