"""What can be applied without Helm, and the files of Tilt and kind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from tests.kube.kube import PATIENCE, ROOT, Kube, Place
from tests.kube.manifests import DIRECTORY, manifests

SAMPLES = sorted((DIRECTORY / "samples").glob("*.yaml"))


def test_the_manifests_are_what_the_chart_renders(helm: Path) -> None:
    for path, text in manifests(helm).items():
        assert path.read_text() == text, f"{path} is out of date: make manifests"


def test_the_chart_has_the_crd_of_the_manifests() -> None:
    chart = ROOT / "charts" / "cloudai" / "files" / "tasks.yaml"
    assert chart.read_text() == (DIRECTORY / "crds" / "tasks.yaml").read_text()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_comes_to_the_state_that_its_comment_says(shared: Place, sample: Path) -> None:
    text = sample.read_text()
    phase = text.partition(":")[0].rpartition(" ")[2]
    name = yaml.safe_load(text)["metadata"]["name"]
    shared.kubectl("apply", "-f", str(sample))
    if phase != "Queued":
        shared.until(name, phase)
        return
    shared.kubectl("wait", f"ctask/{name}", "--for=jsonpath={.status.reason}=Unschedulable", f"--timeout={PATIENCE}s")
    assert shared.get("ctask", name)["status"]["phase"] == "Queued"


def test_everything_is_taken_by_a_real_api_server(kube: Kube, helm: Path) -> None:
    for path in manifests(helm):
        text = path.read_text().replace("cloudai-system", "default").replace("cloudai-tasks", "default")
        kube.kubectl("apply", "--dry-run=server", "-f", "-", given=text)


def test_the_tiltfile_is_read_as_far_as_python_can_and_names_what_there_is() -> None:
    tree = ast.parse((ROOT / "Tiltfile").read_text())
    called = {
        node.func.id: node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {"docker_build_with_restart", "k8s_yaml", "helm", "k8s_resource", "sync"} <= set(called)
    chart = called["helm"].args[0]
    assert isinstance(chart, ast.Constant)
    assert (ROOT / str(chart.value) / "Chart.yaml").exists()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sync":
            source = node.args[0]
            assert isinstance(source, ast.Constant)
            assert (ROOT / str(source.value)).is_dir()
    kind = yaml.safe_load((DIRECTORY / "kind.yaml").read_text())
    assert f"kind-{kind['name']}" in (ROOT / "Tiltfile").read_text()
