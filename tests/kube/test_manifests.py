"""What can be applied without Helm, and what the files of Tilt and kind ask for."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.kube.kube import PATIENCE, ROOT, Kube, Place
from tests.kube.manifests import DIRECTORY, manifests
from tests.kube.test_chart import MINORS
from tests.kube.tilt import tiltfile

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


def test_the_tiltfile_builds_what_its_deployments_run_and_copies_code_to_where_they_look_first(helm: Path) -> None:
    asked = tiltfile(helm)
    deployments = {one["metadata"]["name"]: one for one in asked.objects if one["kind"] == "Deployment"}
    assert set(asked.resources) == set(deployments)
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"].partition(":")[0] == asked.image
        (looks,) = [one["value"] for one in container["env"] if one["name"] == "PYTHONPATH"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is False
        hidden = [mount["mountPath"] for mount in container["volumeMounts"]]
        for source, target in asked.copies:
            assert (ROOT / source / "__init__.py").exists()
            assert target == f"{looks}/{Path(source).name}"
            assert f"{source.removeprefix('./')} {target}\n" in asked.build["dockerfile_contents"]
        for path in (looks, asked.build["restart_file"]):
            assert not [mount for mount in hidden if Path(path).is_relative_to(mount)]
        port = asked.resources[name].get("port_forwards")
        assert port is None or int(port.partition(":")[2]) == container["ports"][0]["containerPort"]
    for one in asked.objects:
        kubernetes_validate.validate(one, MINORS[-1], strict=True)


def test_kind_is_asked_for_the_cluster_that_the_tiltfile_allows(helm: Path) -> None:
    kind = yaml.safe_load((DIRECTORY / "kind.yaml").read_text())
    assert (kind["kind"], kind["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    assert [node["role"] for node in kind["nodes"]] == ["control-plane", "worker"]
    assert set(kind) == {"kind", "apiVersion", "name", "nodes"}
    assert [f"kind-{kind['name']}"] == tiltfile(helm).contexts
