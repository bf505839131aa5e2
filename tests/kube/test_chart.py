"""The chart without a cluster: what it renders, what it refuses."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cloudai.settings import Settings
from cloudai.store.kube.task_resource import TASK_LABEL
from tests.kube.kube import ROOT

CHART = ROOT / "charts" / "cloudai"
MINORS = ("1.35", "1.36", "1.37")  # the three newest of Kubernetes
EVERYTHING = (
    *("--api-versions", "monitoring.coreos.com/v1", "--set", "api.ingress.enabled=true,api.ingress.host=a.example"),
    *("--set", "api.gatewayRoute.enabled=true,api.gatewayRoute.parent=gate,api.gatewayRoute.parentNamespace=gates"),
    *("--set", "api.gatewayRoute.host=a.example", "--set", "tasks.quota.pods=5"),
    *("--set", r"tasks.quota.requests\.hugepages-2Mi=4Mi", "--set", r"tasks.quota.requests\.nvidia\.com/gpu=2"),
)
Json = dict[str, Any]


def fields(required: Sequence[str] = (), **properties: Any) -> Json:
    """The schema of an object that has these fields and no others."""
    return {"type": "object", "additionalProperties": False, "required": [*required], "properties": properties}


def several(item: Json, most: int) -> Json:
    return {"type": "array", "minItems": 1, "maxItems": most, "items": item}


NAME: Json = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
HOST: Json = {"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}
PORT: Json = {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS: Json = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}}
META = fields(["name", "namespace"], name=NAME, namespace=NAME, labels=LABELS)
# Kinds that Kubernetes itself does not know: what of each the chart may use.
FOREIGN = {
    # https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.ServiceMonitorSpec
    "ServiceMonitor": fields(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": "ServiceMonitor"},
        metadata=META,
        spec=fields(
            ["selector", "endpoints"],
            selector=fields(matchLabels=LABELS),
            endpoints=several(fields(["port"], port=NAME, path={"type": "string", "pattern": "^/"}), 1),
        ),
    ),
    # https://gateway-api.sigs.k8s.io/reference/spec/#httproutespec
    "HTTPRoute": fields(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "gateway.networking.k8s.io/v1"},
        kind={"const": "HTTPRoute"},
        metadata=META,
        spec=fields(
            ["parentRefs", "rules"],
            parentRefs=several(fields(["name"], name=NAME, namespace=NAME), 32),
            hostnames=several(HOST, 16),
            rules=several(
                fields(["backendRefs"], backendRefs=several(fields(["name", "port"], name=NAME, port=PORT), 16)), 16
            ),
        ),
    ),
}


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


def test_the_newest_kubernetes_are_the_newest_that_can_be_checked_against() -> None:
    known = {version.rpartition(".")[0] for version in kubernetes_validate.utils.all_versions()}
    assert sorted(known, key=lambda minor: int(minor.partition(".")[2]))[-3:] == list(MINORS)


@pytest.mark.parametrize("kind", FOREIGN)
def test_objects_of_others_have_only_fields_that_those_know(helm: Path, kind: str) -> None:
    found = [one for one in rendered(helm, *EVERYTHING) if one["kind"] == kind]
    assert found
    for one in found:
        jsonschema.validate(one, FOREIGN[kind])


@pytest.mark.parametrize(("version", "fits"), [("1.30.14", False), ("1.31.0", True), ("1.31.2-eks-1a2b3c4", True)])
def test_a_kubernetes_that_is_too_old_is_refused(helm: Path, version: str, fits: bool) -> None:
    done = tried(helm, "template", "cloudai", str(CHART), "--kube-version", version)
    assert (done.returncode == 0) is fits
    assert fits or "chart requires kubeVersion: >=1.31.0-0" in done.stderr


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
        (r"tasks.quota.request\.cpu=1", "quota"),
        (r"tasks.quota.requests\.cpuu=1", "quota"),
        ("tasks.quota.pods=many", "quota"),
        ("tasks.namespace=Not_A_Name", "namespace"),
        ("api.ingress.enabled=true", "host"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.repository=registry.example/cloudai:1.0", "repository"),
        ("tasks.stopGraceSeconds=0", "stopGraceSeconds"),
        ("tasks.podSecurity=restricted", "runAsUser"),
        ("tasks.podSecurity=privileged", "podSecurity"),
        ("operator.resources.limit.memory=1Gi", "additional properties 'limit' not allowed"),
        ("api.resources.requests.memroy=1Gi", "additional properties 'memroy' not allowed"),
        ("operator.resources.limits.memory=1gb", "limits/memory"),
        ("api.tolerations[0].efect=NoSchedule", "additional properties 'efect' not allowed"),
        ("operator.tolerations[0].operator=Exist", "tolerations/0/operator"),
        ("imagePullSecrets[0].nam=registry", "additional properties 'nam' not allowed"),
        ("api.logLevel=loud", "logLevel"),
        ("api.rateLimit.storage=disk://", "storage"),
        ("api.gatewayRoute.enabled=true", "parent"),
        ("serviceMonitor=maybe", "serviceMonitor"),
    ],
)
def test_a_wrong_value_is_refused_by_name(helm: Path, setting: str, words: str) -> None:
    done = tried(helm, "template", "cloudai", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        ("tasks.namespace", "namespace"),
        ("tasks.gpuResource", "gpu_resource"),
        ("api.rateLimit.storage", "rate_limit_storage"),
        ("api.trustedProxies", "trusted_proxies"),
    ],
)
def test_a_value_has_the_form_of_its_setting(value: str, setting: str) -> None:
    known = yaml.safe_load((CHART / "values.schema.json").read_text())
    for name in value.split("."):
        known = known["properties"][name]
    assert known["pattern"] == Settings.model_json_schema()["properties"][setting]["pattern"]


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


def test_what_parts_of_the_cluster_are_asked_for_is_taken(helm: Path) -> None:
    amounts = ("--set", "operator.resources.limits.nvidia\\.com/gpu=1,operator.resources.requests.cpu=1.5")
    toleration = (
        "api.tolerations[0].key=spot,api.tolerations[0].operator=Exists,api.tolerations[0].tolerationSeconds=60"
    )
    deployments = of_kind(rendered(helm, *amounts, "--set", toleration), "Deployment")
    (operator,) = deployments["cloudai-operator"]["spec"]["template"]["spec"]["containers"]
    assert operator["resources"]["limits"] == {"memory": "512Mi", "nvidia.com/gpu": 1}
    assert operator["resources"]["requests"] == {"cpu": "1.5", "memory": "128Mi"}
    tolerations = deployments["cloudai-api"]["spec"]["template"]["spec"]["tolerations"]
    assert tolerations == [{"key": "spot", "operator": "Exists", "tolerationSeconds": 60}]


def test_the_values_are_those_of_the_schema(helm: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())

    def compare(value: Any, known: Json, place: str) -> None:
        known = schema["definitions"][known["$ref"].rpartition("/")[2]] if "$ref" in known else known
        if not isinstance(value, dict) or "properties" not in known:
            return
        assert known["additionalProperties"] is False, place
        assert set(value) == set(known["properties"]) - {"global"}, place  # which is Helm's own
        for name, inner in value.items():
            compare(inner, known["properties"][name], f"{place}.{name}")

    compare(values, schema, "values")


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    assert [line for line in lines if line and not line.endswith(":") and "#" not in line] == []


def test_the_crd_is_the_one_in_the_manifests_and_stays_when_the_chart_goes(helm: Path) -> None:
    manifest = yaml.safe_load((ROOT / "manifests" / "crds" / "tasks.yaml").read_text())
    crd = of_kind(rendered(helm), "CustomResourceDefinition")["tasks.cloudai.dev"]
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == manifest
    assert not of_kind(rendered(helm, "--set", "crds.enabled=false"), "CustomResourceDefinition")
    (going,) = of_kind(rendered(helm, "--set", "crds.keep=false"), "CustomResourceDefinition").values()
    assert going == manifest


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


def test_nobody_connects_to_tasks_nor_tasks_to_the_operator(helm: Path) -> None:
    policies = of_kind(rendered(helm, "--set", "tasks.namespace=work"), "NetworkPolicy")
    assert {name: one["spec"].get("ingress", []) for name, one in policies.items()} == {
        "cloudai-cloudai-cloudai-tasks": [],
        "cloudai-api": [{"ports": [{"port": 8080, "protocol": "TCP"}]}],
        "cloudai-operator": [{"ports": [{"port": 8081, "protocol": "TCP"}], "from": [ELSEWHERE]}],
    }
    assert not of_kind(rendered(helm, "--set", "networkPolicy=false,tasks.networkPolicy=false"), "NetworkPolicy")


def test_what_selects_pods_selects_those_it_is_for(helm: Path) -> None:
    found = rendered(helm, *EVERYTHING)
    pods = {name: one["spec"]["template"] for name, one in of_kind(found, "Deployment").items()}
    for name, template in pods.items():
        labels = template["metadata"]["labels"].items()
        (policy,) = (one for key, one in of_kind(found, "NetworkPolicy").items() if key == name)
        selectors = [policy["spec"]["podSelector"]["matchLabels"]]
        selectors += [
            one["spec"]["selector"]["matchLabels"]
            for kind in ("Deployment", "PodDisruptionBudget")
            for key, one in of_kind(found, kind).items()
            if key == name
        ]
        selectors += [one["spec"]["selector"] for key, one in of_kind(found, "Service").items() if key == name]
        others = [other["metadata"]["labels"].items() for key, other in pods.items() if key != name]
        for selector in selectors:
            assert selector.items() <= labels
            assert not any(selector.items() <= other for other in others)
    services = [one["metadata"]["labels"].items() for one in of_kind(found, "Service").values()]
    for monitor in of_kind(found, "ServiceMonitor").values():
        assert any(monitor["spec"]["selector"]["matchLabels"].items() <= one for one in services)


def test_the_tasks_network_policy_is_for_the_pods_that_the_operator_makes(helm: Path) -> None:
    (policy,) = (one for name, one in of_kind(rendered(helm), "NetworkPolicy").items() if name.endswith("-tasks"))
    (expression,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert expression == {"key": TASK_LABEL, "operator": "Exists"}


NAMESPACE = "kubernetes.io/metadata.name"
ELSEWHERE = {"namespaceSelector": {"matchExpressions": [{"key": NAMESPACE, "operator": "NotIn", "values": ["work"]}]}}


def test_what_is_optional_comes_when_it_is_asked_for(helm: Path) -> None:
    plain = rendered(helm)
    assert not of_kind(plain, "ServiceMonitor")
    assert not of_kind(plain, "Ingress")
    assert not of_kind(plain, "ResourceQuota")
    kinds = {one["kind"] for one in rendered(helm, *EVERYTHING)}
    assert {"ServiceMonitor", "Ingress", "HTTPRoute", "ResourceQuota", "PodDisruptionBudget", "NetworkPolicy"} <= kinds
