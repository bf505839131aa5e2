"""Settings: every one from its flag, its variable or its default; what is wrong is said in a sentence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cloudai.settings import Settings, SettingsError, flag, load, parts, variable


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def complaint(**flags: object) -> str:
    with pytest.raises(SettingsError) as error:
        load(flags)
    return str(error.value)


def test_defaults_are_those_of_the_documents() -> None:
    settings = load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert (settings.heartbeat_seconds, settings.lease_seconds, settings.stop_grace_seconds) == (10, 300, 10)
    assert settings.telemetry_seconds == 5
    assert (settings.rate_limit_submit, settings.rate_limit_status, settings.rate_limit_websockets) == (
        "10/minute",
        "60/minute",
        5,
    )


def test_a_flag_wins_over_its_variable_and_the_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_PORT", "9000")
    assert load().port == 9000
    assert load({"port": "9001"}).port == 9001
    assert load({"port": None}).port == 9000


def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_DATABSE_URL", "sqlite:///x")
    assert complaint() == "unknown setting CLOUDAI_DATABSE_URL; did you mean CLOUDAI_DATABASE_URL?"


def test_an_unknown_variable_near_to_nothing_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_ZZZ", "1")
    assert "docs/configuration.md" in complaint()


def test_variables_of_the_test_suite_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_TEST_ANYTHING", "1")
    load()


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_PORT", "")
    assert load().port == 8080


def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDAI_PORT", "many")
    assert complaint().startswith("CLOUDAI_PORT must be a valid integer")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("port", "70000", "--port must be less than or equal to 65535, not '70000'"),
        ("heartbeat_seconds", "0", "--heartbeat-seconds must be greater than 0, not '0'"),
        ("heartbeat_seconds", "inf", "--heartbeat-seconds must be a finite number, not 'inf'"),
        ("cpu", "0.0004", "--cpu must be greater than or equal to 0.001, not '0.0004'"),
        ("memory", "1e9", "--memory must be less than or equal to 1048576, not '1e9'"),
        ("storage", "inf", "--storage must be less than or equal to 1048576, not 'inf'"),
        ("runtime", "podman", "--runtime must be 'auto', 'docker' or 'process', not 'podman'"),
        ("rate_limit_submit", "fast", "--rate-limit-submit must be a number of requests and a time"),
        ("database_url", "mysql://x", "--database-url must be sqlite:///PATH or postgresql://"),
        ("worker_id", "-x", "--worker-id must be 1 to 63 letters"),
        ("rate_limit_storage", "nonsense://x", "--rate-limit-storage must be memory:// or redis://host:port, not"),
        ("allowed_hosts", "http://foo/", "--allowed-hosts must be names such as"),
        ("trusted_proxies", "the ingress", "--trusted-proxies must be addresses or networks such as"),
        ("gpu_resource", "gpu", "--gpu-resource must be a domain and a name, such as nvidia.com/gpu, not 'gpu'"),
        ("server", "localhost:8080", "--server must be a URL such as http://master-node:8080, not 'localhost:8080'"),
    ],
)
def test_a_bad_flag_is_told_in_a_sentence(name: str, value: str, words: str) -> None:
    assert words in complaint(**{name: value})


def test_a_lease_shorter_than_three_heartbeats_is_refused() -> None:
    with pytest.raises(SettingsError, match="--lease-seconds must be at least 60"):
        load({"heartbeat_seconds": 20.0, "lease_seconds": 59.0})
    assert load({"heartbeat_seconds": 20.0, "lease_seconds": 60.0}).lease_seconds == 60


def test_every_wrong_setting_is_told_at_once() -> None:
    assert complaint(port="x", cpu="-1").count("must be") == 2


def test_a_lease_may_be_infinite() -> None:
    assert math.isinf(load({"lease_seconds": "inf"}).lease_seconds)


def test_the_database_is_in_the_data_directory_unless_told() -> None:
    assert load({"data_dir": "/x/y"}).url == "sqlite:////x/y/cloudai.db"
    assert load({"data_dir": "/x", "database_url": "postgresql://h/d"}).url == "postgresql://h/d"
    assert load().data_dir == Path("cloudai-data")


def test_none_keeps_the_capabilities_of_docker() -> None:
    assert load({"cap_drop": "none"}).cap_drop == ""


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_belongs_to_a_part_and_is_described(name: str) -> None:
    assert parts(name) <= {"api", "controller", "agent", "operator"}
    assert parts(name)
    assert (Settings.model_fields[name].description or "").endswith(".")
    assert flag(name).startswith("--")
