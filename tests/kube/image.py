"""The project's own image, built by its Dockerfile on a base of Debian's packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

from tests.cluster.binaries import cache
from tests.kube.kube import ROOT

NAME = "cloudai.test/cloudai"
TAG = "test"
BASE = "cloudai.test/debian:12"
STAGE = "cloudai.test/build:kept"  # the Dockerfile's first stage: what the lock file names, installed
PACKAGES = "python3,python3-venv,ca-certificates"
NEEDLESS = ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*", "usr/share/locale/*", "usr/share/man/*")
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def build(docker_host: str) -> bytes:
    """The image as `docker save` gives it. What Debian and the lock file name is fetched once and kept."""
    dockerfile, debian = ROOT / "Dockerfile", _debian()
    inputs = (dockerfile.read_bytes(), (ROOT / "requirements-image.lock").read_bytes(), debian.name.encode())
    kept = cache() / f"image-{hashlib.sha256(b' '.join(inputs)).hexdigest()[:16]}.tar"
    if kept.exists():
        _docker(docker_host, "load", "-i", str(kept))
    else:
        with debian.open("rb") as root:
            _docker(docker_host, "import", "-", BASE, stdin=root)
        build_as(docker_host, STAGE, dockerfile.read_text(), "--target", "build")
        fresh = kept.with_suffix(f".{os.getpid()}")
        _docker(docker_host, "save", "-o", str(fresh), BASE, STAGE)
        for older in kept.parent.glob("image-*.tar"):
            older.unlink()
        fresh.rename(kept)
    build_as(docker_host, f"{NAME}:{TAG}", dockerfile.read_text(), "--cache-from", STAGE)
    return _docker(docker_host, "save", f"{NAME}:{TAG}")


def build_as(docker_host: str, name: str, dockerfile: str, *flags: str) -> None:
    """An image of that text, on the base that `build` has made."""
    command = ("build", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE}", *flags, "-t", name, "-f", "-", ".")
    _docker(docker_host, *command, given=dockerfile.encode())


def _docker(host: str, *command: str, given: bytes | None = None, stdin: IO[bytes] | None = None) -> bytes:
    done = subprocess.run(
        ["docker", *command],
        env={**os.environ, "DOCKER_HOST": host, "DOCKER_BUILDKIT": "0"},
        cwd=ROOT,
        input=given,
        stdin=stdin,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-3000:] + done.stderr[-3000:]).decode(errors="replace")
    return done.stdout


def _debian() -> Path:
    """A root file system with Python, and with the authorities that this machine trusts, as a tar file."""
    kept = cache() / "debian-12-slim.tar"
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
    without = [f"--exclude=./{one}" for one in NEEDLESS]
    subprocess.run(["tar", "-C", str(scratch), *without, "-cf", str(fresh), "."], check=True)
    fresh.rename(kept)
    shutil.rmtree(scratch)
    return kept
