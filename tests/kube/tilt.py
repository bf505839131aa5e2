"""What the Tiltfile asks of Tilt: Starlark is near enough to Python, and few of Tilt's functions are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.kube.kube import ROOT, Json
from tests.kube.test_chart import tried


@dataclass
class Asked:
    """Everything the Tiltfile called for."""

    contexts: list[str] = field(default_factory=list)
    image: str = ""
    build: Json = field(default_factory=dict)
    objects: list[Json] = field(default_factory=list)
    resources: dict[str, Json] = field(default_factory=dict)

    @property
    def copies(self) -> list[tuple[str, str]]:
        """From where in this directory to where in a container."""
        return list(self.build["live_update"])


def tiltfile(helm: Path) -> Asked:
    asked = Asked()

    def build(image: str, context: str, **how: Any) -> None:
        asked.image, asked.build = image, {"context": context, **how}

    def chart(path: str, name: str, namespace: str, set: list[str]) -> str:
        values = [part for one in set for part in ("--set", one)]
        done = tried(helm, "template", name, str(ROOT / path), "-n", namespace, "--skip-tests", *values)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def resource(name: str, **how: Any) -> None:
        asked.resources[name] = how

    def load(extension: str, *names: str) -> None:
        assert (extension, names) == ("ext://restart_process", ("docker_build_with_restart",))

    functions = {
        "load": load,
        "allow_k8s_contexts": asked.contexts.append,
        "read_file": lambda path: (ROOT / path).read_text(),
        "docker_build_with_restart": build,
        "sync": lambda source, target: (source, target),
        "helm": chart,
        "decode_yaml_stream": lambda text: [one for one in yaml.safe_load_all(text) if one],
        "encode_yaml_stream": yaml.safe_dump_all,
        "k8s_yaml": lambda text: asked.objects.extend(yaml.safe_load_all(text)),
        "k8s_resource": resource,
    }
    exec(compile((ROOT / "Tiltfile").read_text(), "Tiltfile", "exec"), functions)
    return asked
