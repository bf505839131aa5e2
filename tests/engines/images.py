"""Images made on the spot, so that tests need no registry on the internet."""

from __future__ import annotations

import contextlib

import docker

from scripts.demo_image import BUSYBOX, is_static, root_of_busybox
from tests.engines import missing

NAME = "cloudai-test-busybox:1"


def build_busybox(host: str) -> str:
    """The name of an image of all busybox commands, in /bin; made from this machine's own static busybox."""
    if not is_static(BUSYBOX):
        missing("A static busybox", "apt-get install busybox-static, or run scripts/provision as root")
    with contextlib.closing(docker.DockerClient(base_url=host, timeout=60)) as client:
        repository, _, tag = NAME.partition(":")
        changes = ["ENV PATH=/bin", 'CMD ["sh"]']
        client.api.import_image_from_data(root_of_busybox(), repository, tag, changes=changes)
    return NAME
