"""Every setting, once. A field here is an environment variable `CLOUDAI_<NAME>`, a flag `--<name>` of the commands in its
`parts`, a row of docs/configuration.md and a line of `--help`; an unknown `CLOUDAI_` variable is an error.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloudai.resources import MOST_GPUS, WORKER_NAME

PREFIX = "CLOUDAI_"
_TEST_PREFIX = "CLOUDAI_TEST_"  # variables of the test suite
_TOLD = {"CLOUDAI_TASK_ID", "CLOUDAI_ATTEMPT"}  # what a task is told, in which a command may run


class SettingsError(Exception):
    """A setting that cannot be used, in a sentence for the operator."""


def _setting(default: Any, text: str, *parts: str, form: str | None = None, **limits: Any) -> Any:
    """`form` says in words what a `pattern` asks for."""
    return Field(default, description=text, json_schema_extra={"parts": list(parts), "form": form}, **limits)


_RATE = r"^[1-9][0-9]*/(second|minute|hour|day)$"
_RATE_FORM = "a number of requests and a time, such as 10/minute (second, minute, hour or day)"


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Settings of the server parts and the agent. `parts` of a field: the commands that take it as a flag."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", env_ignore_empty=True)

    host: str = _setting(
        "127.0.0.1", "Address the API listens on; of the operator, its probes and metrics.", "api", "operator"
    )
    port: int = _setting(8080, "Port the API listens on; 0 takes a free one.", "api", "operator", ge=0, le=65535)
    data_dir: Path = _setting(
        Path("./cloudai-data"), "Where the embedded database and local state live.", "api", "controller", "agent"
    )
    database_url: str | None = _setting(
        None,
        "SQLAlchemy URL of the store, sqlite:///… or postgresql://…; default is cloudai.db in the data directory.",
        "api",
        "controller",
        pattern=r"^(sqlite:///.+|postgresql(\+psycopg)?://.+)$",
        form="sqlite:///PATH or postgresql://USER@HOST/NAME",
    )
    log_format: Literal["text", "json"] = _setting(
        "text", "Readable lines or one JSON object a line.", "api", "controller", "agent", "operator"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least severe messages shown.", "api", "controller", "agent", "operator"
    )

    # Kubernetes
    store: Literal["sql", "kubernetes"] = _setting(
        "sql", "Where tasks are kept: in the database, or as resources of a Kubernetes cluster.", "api"
    )
    namespace: str = _setting(
        "cloudai-tasks",
        "Kubernetes namespace of the tasks and their pods.",
        "api",
        "operator",
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        form="the name of a namespace",
    )
    kubeconfig: Path | None = _setting(
        None, "Kubeconfig file; default is the service account in a cluster, else KUBECONFIG.", "api", "operator"
    )
    gpu_resource: str = _setting(
        "nvidia.com/gpu",
        "Kubernetes resource that a GPU is.",
        "api",
        "operator",
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        form="a domain and a name, such as nvidia.com/gpu",
    )
    image_grace_seconds: Seconds = _setting(
        60.0,
        "How long Kubernetes may fail to start a task, such as to fetch its image, before the task fails.",
        "operator",
    )
    task_run_as_user: int | None = _setting(
        None, "User id that tasks on Kubernetes run as unless they name one; default is the image's.", "operator", ge=1
    )

    # Leases: the API hands them to the agents, the controller judges by them.
    heartbeat_seconds: Seconds = _setting(
        10.0, "How often an agent reports; silent for three of these is inactive.", "api", "controller"
    )
    lease_seconds: float = _setting(
        300.0,
        "How long a worker may be cut off before its tasks count as lost, three heartbeats at least; inf for never.",
        "api",
        "controller",
        gt=0,
    )
    stop_grace_seconds: float = _setting(
        10.0,
        "Time between TERM and KILL when a container is stopped.",
        "api",
        "controller",
        "operator",
        ge=0,
        le=3600,
        allow_inf_nan=False,
    )

    # Facade
    allowed_hosts: str = _setting(
        "",
        "Further Host names to accept, comma separated, when the API is bound to loopback; * accepts any. Pages"
        " under these names may use the API, whatever it is bound to.",
        "api",
        pattern=r"^[^/\s]*(, *[^/\s]+)*$",
        form="names such as cloudai.example.org, separated by commas",
    )
    trusted_proxies: str = _setting(
        "",
        "Addresses or networks, comma separated, whose X-Forwarded-For header is believed.",
        "api",
        pattern=r"^([0-9A-Fa-f:.]+(/[0-9.]+)?(, *[0-9A-Fa-f:.]+(/[0-9.]+)?)*)?$",
        form="addresses or networks such as 10.0.0.0/8, separated by commas",
    )
    max_body_bytes: int = _setting(1024 * 1024, "Largest request body accepted.", "api", ge=1024)
    rate_limit_enabled: bool = _setting(True, "Limit requests per client address.", "api")
    rate_limit_submit: str = _setting(
        "10/minute", "Submits allowed per client address.", "api", pattern=_RATE, form=_RATE_FORM
    )
    rate_limit_status: str = _setting(
        "60/minute", "Status queries allowed per client address.", "api", pattern=_RATE, form=_RATE_FORM
    )
    rate_limit_websockets: int = _setting(5, "Concurrent telemetry WebSockets per client address.", "api", ge=1)
    rate_limit_storage: str = _setting(
        "memory://",
        "Where counts are kept: memory:// or redis://host:port for several replicas.",
        "api",
        pattern=r"^(memory://|rediss?://.+)$",
        form="memory:// or redis://host:port",
    )
    telemetry_seconds: Seconds = _setting(5.0, "Interval of telemetry_update messages.", "api")

    # Retention
    task_retention_seconds: float = _setting(
        30 * 86400.0, "How long finished tasks are kept; inf for ever.", "controller", "operator", gt=0
    )
    log_retention_seconds: float = _setting(
        7 * 86400.0, "How long logs of finished tasks are kept; inf as long as the task.", "controller", gt=0
    )

    # Agent
    server: str = _setting(
        "http://127.0.0.1:8080",
        "URL of the API that the agent joins; client commands read the same variable.",
        "agent",
        pattern=r"^https?://[^/\s]+",
        form="a URL such as http://master-node:8080",
    )
    token_file: Path | None = _setting(None, "File that holds the join token (see `cloudai token create`).", "agent")
    worker_id: str | None = _setting(
        None,
        "Name of this worker; default is the host name.",
        "agent",
        pattern=WORKER_NAME,
        form="1 to 63 letters, digits, dots, dashes or underscores, with a letter or digit at both ends",
    )
    runtime: Literal["auto", "docker", "process"] = _setting(
        "auto", "Where tasks run: docker, process (no isolation, for trying out), or auto.", "agent"
    )
    # As a worker's registration takes them, and as a task may ask for them.
    cpu: float | None = _setting(None, "Cores offered; default all.", "agent", ge=0.001, le=100_000)
    memory: float | None = _setting(
        None, "GiB of memory offered; default 90 % of the machine.", "agent", ge=0.001, le=1_048_576
    )
    storage: float | None = _setting(
        None,
        "GiB of storage offered; default 80 % of what is free or its tasks' own where containers live.",
        "agent",
        gt=0,
        le=1_048_576,
    )
    gpu: int | None = _setting(
        None, "Number of GPUs offered; default those the NVIDIA driver shows.", "agent", ge=0, le=MOST_GPUS
    )
    advertise_address: str | None = _setting(
        None,
        "Address reported as worker_ip; default is the one that reaches the server.",
        "agent",
        pattern=r"^[^\s/]+$",
        form="an address or a host name",
    )
    health_port: int = _setting(
        50052, "Port of the agent's health and metrics endpoint; 0 takes a free one.", "agent", ge=0, le=65535
    )
    pull_policy: Literal["missing", "always", "never"] = _setting("missing", "When an image is pulled.", "agent")
    pull_timeout_seconds: Seconds = _setting(1800.0, "Longest image pull.", "agent")
    pids_limit: int = _setting(4096, "Most processes and threads in one container.", "agent", ge=1)
    cap_drop: Annotated[str, BeforeValidator(lambda value: "" if value == "none" else value)] = _setting(
        "NET_RAW,MKNOD,AUDIT_WRITE,SETFCAP,NET_BIND_SERVICE,SYS_CHROOT",
        "Capabilities taken from containers, comma separated; ALL for every one, none for Docker's default.",
        "agent",
    )
    network: str | None = _setting(
        None, "Docker network of the containers (bridge, host, none, or a name); default is Docker's.", "agent"
    )
    max_log_bytes: int = _setting(
        64 * 1024 * 1024, "Longest log kept of one attempt; the rest is cut with a marker.", "agent", ge=1024
    )
    storage_check_seconds: Seconds = _setting(10.0, "How often the storage used by containers is measured.", "agent")

    @property
    def url(self) -> str:
        """The store's URL."""
        return self.database_url or f"sqlite:///{quote(str(self.data_dir.absolute() / 'cloudai.db'))}"

    @property
    def heartbeat_ms(self) -> int:
        return round(self.heartbeat_seconds * 1000)


def load(flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from flags (None: not given), then the environment, then defaults.

    Raises SettingsError that names the variable or flag and what is wrong with it.
    """
    refuse_unknown(os.environ)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name, value in given.items():
        kind = Settings.model_fields[name].annotation
        if value == "" and Path in (kind, *get_args(kind)):  # it would mean the current directory
            raise SettingsError(f"{flag(name)} must not be empty")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(wrong, given) for wrong in error.errors())) from None
    if str(settings.data_dir) != str(settings.data_dir).encode(errors="replace").decode():
        raise SettingsError(f"{_place('data_dir', given)} must be a path in UTF-8")
    if settings.lease_seconds < 3 * settings.heartbeat_seconds:
        least = f"{3 * settings.heartbeat_seconds:g}, three times {variable('heartbeat_seconds')}"
        raise SettingsError(
            f"{_place('lease_seconds', given)} must be at least {least}, or workers that are well lose their tasks"
        )
    return settings


def _sentence(wrong: ErrorDetails, flags: Mapping[str, Any]) -> str:
    name = str(wrong["loc"][0])
    place = _place(name, flags)
    form = _extra(name).get("form")
    if wrong["type"] == "string_pattern_mismatch" and form:
        return f"{place} must be {form}, not {wrong['input']!r}"
    words = wrong["msg"].removeprefix("Input should be ")
    if words != wrong["msg"]:
        return f"{place} must be {words}, not {wrong['input']!r}"
    return f"{place}: {wrong['msg']}, not {wrong['input']!r}"


def _place(name: str, flags: Mapping[str, Any]) -> str:
    """Where a setting was given."""
    return flag(name) if name in flags else variable(name)


def refuse_unknown(environ: Mapping[str, str]) -> None:
    """Raises SettingsError for a CLOUDAI_ variable that is no setting, with the nearest name that is one."""
    names = list(Settings.model_fields)
    known = {variable(name) for name in names} | _TOLD
    for given in sorted(environ):
        if not given.startswith(PREFIX) or given in known or given.startswith(_TEST_PREFIX):
            continue
        near = difflib.get_close_matches(given.removeprefix(PREFIX).lower(), names, n=1)
        hint = f"did you mean {variable(near[0])}?" if near else "docs/configuration.md lists all settings"
        raise SettingsError(f"unknown setting {given}; {hint}")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def flag(name: str) -> str:
    """The command line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def parts(name: str) -> frozenset[str]:
    """The commands that take a setting: of `api`, `controller`, `agent`."""
    return frozenset(_extra(name)["parts"])


def _extra(name: str) -> dict[str, Any]:
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return dict(extra)
