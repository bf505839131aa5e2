"""The chart without a cluster: what it renders, what it refuses."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.kube.kube import ROOT

CHART = ROOT / "charts" / "cloudai"
MINORS = ("1.35", "1.36", "1.37")  # the three newest of Kubernetes
FOREIGN = ("ServiceMonitor", "HTTPRoute")  # kinds that Kubernetes itself does not know
EVERYTHING = (
    *("--api-versions", "monitoring.coreos.com/v1", "--set", "api.ingress.enabled=true,api.ingress.host=a.example"),
    *("--set", "api.gatewayRoute.enabled=true,api.gatewayRoute.parent=gate", "--set", "tasks.quota.pods=5"),
)
Json = dict[str, Any]


def tried(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(helm), *arguments], capture_output=True, text=True, check=False)


def rendered(helm: Path, *arguments: str, release: str = "cloudai", namespace: str = "cloudai") -> list[Json]:
    done = tried(helm, "template", release, str(CHART), "-n", namespace, *arguments)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.mark.parametrize("minor", MINORS)
def test_every_object_is_one_of_the_newest_kubernetes(helm: Path, minor: str) -> None:
    for one in rendered(helm, *EVERYTHING):
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, minor, strict=True)


def of_kind(objects: Sequence[Json], kind: str) -> dict[str, Json]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def test_it_passes_helms_own_look(helm: Path) -> None:
    done = tried(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("operator.replica=3", "additional properties 'replica' not allowed"),
        ("api.service.port=0", "port"),
        ("tasks.namespace=Not_A_Name", "namespace"),
        ("api.ingress.enabled=true", "host"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("tasks.stopGraceSeconds=0", "stopGraceSeconds"),
        ("tasks.podSecurity=restricted", "runAsUser"),
    ],
)
def test_a_wrong_value_is_refused_by_name(helm: Path, setting: str, words: str) -> None:
    done = tried(helm, "template", "cloudai", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert words in done.stderr


def test_values_that_yaml_would_read_otherwise_stay_what_they_are(helm: Path) -> None:
    names = ("--set-string", "tasks.namespace=2024", "--set", "api.ingress.enabled=true")
    objects = rendered(helm, *names, "--set-string", "api.ingress.host=*.apps.example")
    (ingress,) = of_kind(objects, "Ingress").values()
    assert ingress["spec"]["rules"][0]["host"] == "*.apps.example"
    for deployment in of_kind(objects, "Deployment").values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {"name": "CLOUDAI_NAMESPACE", "value": "2024"} in container["env"]
    assert "2024" in of_kind(objects, "Namespace")


def test_releases_of_one_name_in_two_namespaces_share_nothing_of_the_cluster(helm: Path) -> None:
    def shared(namespace: str) -> set[tuple[str, str]]:
        found = rendered(helm, "--set", f"tasks.namespace={namespace}-tasks", namespace=namespace)
        wide = [one for one in found if one["metadata"].get("namespace") in (None, "kube-node-lease")]
        return {(one["kind"], one["metadata"]["name"]) for one in wide if one["kind"] != "CustomResourceDefinition"}

    assert shared("one")
    assert not shared("one") & shared("two")


def test_every_value_is_in_the_schema_and_has_a_comment_or_says_itself(helm: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())

    def compare(value: Any, known: Json, place: str) -> None:
        if not isinstance(value, dict) or "properties" not in known:
            return
        assert set(value) <= set(known["properties"]), place
        for name, inner in value.items():
            compare(inner, known["properties"][name], f"{place}.{name}")

    compare(values, schema, "values")


def test_the_crd_is_the_one_in_the_manifests_and_stays_when_the_chart_goes(helm: Path) -> None:
    manifest = yaml.safe_load((ROOT / "manifests" / "crds" / "tasks.yaml").read_text())
    crd = of_kind(rendered(helm), "CustomResourceDefinition")["tasks.cloudai.dev"]
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == manifest
    assert not of_kind(rendered(helm, "--set", "crds.enabled=false"), "CustomResourceDefinition")


def test_pods_are_as_restricted_as_the_strictest_standard_asks(helm: Path) -> None:
    for deployment in of_kind(rendered(helm), "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_what_is_optional_comes_when_it_is_asked_for(helm: Path) -> None:
    plain = rendered(helm)
    assert not of_kind(plain, "ServiceMonitor")
    assert not of_kind(plain, "Ingress")
    assert not of_kind(plain, "ResourceQuota")
    kinds = {one["kind"] for one in rendered(helm, *EVERYTHING)}
    assert {"ServiceMonitor", "Ingress", "HTTPRoute", "ResourceQuota", "PodDisruptionBudget", "NetworkPolicy"} <= kinds
