"""A small image for the demo: one the engine has, one it can fetch, or one made of this machine's own busybox."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound

PULL_SECONDS = 15
BUSYBOX = Path("/bin/busybox")
OWN_IMAGE = "cloudai-demo:busybox"


@contextlib.contextmanager
def demo_image() -> Iterator[tuple[str | None, str]]:
    """An image's name, None where no engine can run one, with a sentence that says so. Removes what it made."""
    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        yield None, "No Docker engine answers, so tasks run as plain processes"
        return
    with contextlib.closing(client):
        if present(client, "busybox:latest"):
            yield "busybox", "Docker answers and has a busybox image"
        elif pull(client):
            yield "busybox", "Docker answers; fetched the busybox image"
        elif is_static(BUSYBOX):
            repository, _, tag = OWN_IMAGE.partition(":")
            client.api.import_image_from_data(root_of_busybox(), repository, tag, changes=["ENV PATH=/bin"])
            try:
                yield OWN_IMAGE, "Docker answers, no registry does; made an image of this machine's busybox"
            finally:
                client.images.remove(OWN_IMAGE, force=True)
        else:
            yield None, "Docker answers but has no image and reaches no registry, so tasks run as plain processes"


def present(client: docker.DockerClient, image: str) -> bool:
    try:
        client.images.get(image)
    except ImageNotFound:
        return False
    return True


def pull(client: docker.DockerClient) -> bool:
    """Whether busybox came within PULL_SECONDS."""

    def fetch() -> None:
        with contextlib.suppress(DockerException, OSError):
            client.images.pull("busybox", tag="latest")

    fetching = threading.Thread(target=fetch, daemon=True)
    fetching.start()
    fetching.join(PULL_SECONDS)
    return present(client, "busybox:latest")


def is_static(program: Path) -> bool:
    """Whether a 64-bit ELF program asks for no loader, and so runs in an image that holds nothing else."""
    if not program.exists():
        return False
    data = program.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return False
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    kinds = [struct.unpack_from("<I", data, start + size * number)[0] for number in range(count)]
    interpreter = 3
    return interpreter not in kinds


def root_of_busybox() -> bytes:
    """A root file system as a tar: /bin/busybox and a link for each of its commands, and /tmp."""
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in (("bin", 0o755), ("tmp", 0o1777)):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, mode
            archive.addfile(directory)
        archive.add(BUSYBOX.resolve(), "bin/busybox")
        for command in set(listed) - {"busybox"}:
            link = tarfile.TarInfo(f"bin/{command}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return buffer.getvalue()
