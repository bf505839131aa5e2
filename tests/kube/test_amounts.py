"""Kubernetes' quantities, and what a Pod of anybody's holds of its node. Without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudai.resources import Resources
from cloudai.store.kube import quantity
from cloudai.store.kube.pods import requests_of

MI = 2**20
GI = 2**30


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (0, "0"),
        (1000, "1000"),
        (1024, "1Ki"),
        (2560 * MI, "2560Mi"),
        (2 * GI, "2Gi"),
        (2 * GI + 1, "2147483649"),
        (3 * 1024 * GI, "3Ti"),
        (quantity.LARGEST, "9223372036854775807"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_that_is_exact(amount: int, words: str) -> None:
    assert quantity.of_bytes(amount) == words


@pytest.mark.parametrize(("amount", "words"), [(0, "0"), (1, "1m"), (500, "500m"), (2000, "2"), (2500, "2500m")])
def test_cores_are_told_whole_or_in_thousandths(amount: int, words: str) -> None:
    assert quantity.of_milli(amount) == words


@given(st.integers(0, quantity.LARGEST))
def test_what_is_told_reads_the_same(amount: int) -> None:
    assert quantity.whole(quantity.of_bytes(amount)) == amount
    assert quantity.milli(quantity.of_milli(amount)) == amount


@pytest.mark.parametrize(
    ("words", "milli", "whole"),
    [
        ("100m", 100, 1),
        ("1.5", 1500, 2),
        ("0.0001", 1, 1),
        ("1u", 1, 1),
        ("2k", 2_000_000, 2000),
        ("1Ki", 1_024_000, 1024),
        ("1e3", 1_000_000, 1000),
        ("1E", quantity.LARGEST, 10**18),
        (".5", 500, 1),
        (3, 3000, 3),
        (0.25, 250, 1),
    ],
)
def test_a_quantity_is_read_as_kubernetes_reads_it_and_rounded_up(words: str | float, milli: int, whole: int) -> None:
    assert (quantity.milli(words), quantity.whole(words)) == (milli, whole)


@pytest.mark.parametrize(
    "words", ["", "Mi", "1KiB", "1 Gi", "1mi", "1ki", "1K", "0x10", "1e", "--1", "٣", "1Gi\n", "nan"]
)
def test_what_is_no_quantity_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        quantity.parse(words)


def asking(cpu: str, memory: str, **more: str) -> dict[str, Any]:
    return {"resources": {"requests": {"cpu": cpu, "memory": memory, **more}}}


def sidecar(cpu: str, memory: str) -> dict[str, Any]:
    return asking(cpu, memory) | {"restartPolicy": "Always"}


def requested(**spec: Any) -> tuple[int, int]:
    """Thousandths of cores, and MiB."""
    found = requests_of({"spec": spec})
    assert found.memory % MI == 0
    return found.cpu, found.memory // MI


def test_a_pod_holds_the_sum_of_its_containers() -> None:
    containers = [
        asking("1", "1Gi", **{"ephemeral-storage": "1Ki"}),
        asking("500m", "512Mi", **{"nvidia.com/gpu": "2"}),
    ]
    assert requests_of({"spec": {"containers": containers}}) == Resources(1500, 1536 * MI, 1024, 2000)
    assert requests_of({"spec": {"containers": [{}, {"resources": {}}]}}) == Resources(0, 0, 0, 0)


def test_a_gpu_is_what_the_settings_call_so() -> None:
    pod = {"spec": {"containers": [asking("1", "1Gi", **{"amd.com/gpu": "3", "nvidia.com/gpu": "2"})]}}
    assert requests_of(pod, "amd.com/gpu").gpu == 3000


def test_a_limit_is_a_request_where_there_is_none() -> None:
    limits = {"cpu": "2", "memory": "1Gi"}
    assert requested(containers=[{"resources": {"limits": limits}}]) == (2000, 1024)
    assert requested(containers=[{"resources": {"limits": limits, "requests": {"cpu": "1"}}}]) == (1000, 1024)


def test_what_runs_before_counts_where_it_is_larger() -> None:
    later = [asking("1", "1Gi"), asking("1", "1Gi")]
    assert requested(initContainers=[asking("3", "1Gi"), asking("1", "3Gi")], containers=later) == (3000, 3072)
    assert requested(initContainers=[asking("1", "1Gi"), asking("1", "1Gi")], containers=later) == (2000, 2048)


def test_a_sidecar_counts_beside_all_that_starts_after_it() -> None:
    later = [asking("1", "1Gi")]
    assert requested(initContainers=[sidecar("500m", "512Mi")], containers=later) == (1500, 1536)
    before = [asking("2", "2Gi"), sidecar("500m", "512Mi")]
    assert requested(initContainers=before, containers=later) == (2000, 2048)
    after = [sidecar("500m", "512Mi"), asking("2", "2Gi")]
    assert requested(initContainers=after, containers=later) == (2500, 2560)


def test_overhead_comes_on_top() -> None:
    overhead = {"cpu": "250m", "memory": "128Mi"}
    assert requested(containers=[asking("1", "1Gi")], overhead=overhead) == (1250, 1152)


def test_requests_of_the_pod_as_a_whole_take_the_place_of_its_containers() -> None:
    whole = {"requests": {"cpu": "4"}}
    containers = [asking("1", "1Gi", **{"ephemeral-storage": "1Ki"})]
    overhead = {"cpu": "250m"}
    found = requests_of({"spec": {"containers": containers, "resources": whole, "overhead": overhead}})
    assert found == Resources(4250, 1024 * MI, 1024, 0)
