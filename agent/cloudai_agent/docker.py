"""Containers in a Docker Engine, through the `docker` SDK's low-level client.

Labels are what makes a container ours: cluster, worker, task and attempt. One that lacks them is never listed, never
stopped, never removed, whatever its name.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import docker
import psutil
import requests
from docker.errors import APIError, NotFound
from docker.types import DeviceRequest

from cloudai.resources import Reason, Resources, Run
from cloudai.settings import Settings
from cloudai_agent import docker_images
from cloudai_agent.docker_calls import CALL_SECONDS, answering, engine_words
from cloudai_agent.runtime import Container, ContainerState, EngineDown, RunRefused, device_list

log = logging.getLogger("cloudai.agent")

CLUSTER, WORKER, TASK, ATTEMPT = "cloudai.cluster", "cloudai.worker", "cloudai.task", "cloudai.attempt"
LEAST_MEMORY = 6 * 1024 * 1024  # the engine refuses less
RECONNECT_SECONDS = 1.0
CONNECTIONS = 256  # one for each call under way and each log that is followed

_STATES = {
    "created": ContainerState.CREATED,
    "running": ContainerState.RUNNING,
    "paused": ContainerState.RUNNING,
    "restarting": ContainerState.RUNNING,
    "removing": ContainerState.EXITED,
    "exited": ContainerState.EXITED,
    "dead": ContainerState.EXITED,
}
_NO_COMMAND = re.compile(r"executable file not found|no such file or directory|stat .*: no such", re.IGNORECASE)


class DockerRuntime:
    """Implements Runtime. The engine is the one that DOCKER_HOST names, or the local socket."""

    kind: Literal["docker", "process"] = "docker"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._labels: dict[str, str] = {}
        self._client: Any = None  # docker.APIClient, whose types are partly unknown
        self._connecting = threading.Lock()
        self._closed = False

    def bind(self, cluster_id: str, worker_id: str) -> None:
        self._labels = {CLUSTER: cluster_id, WORKER: worker_id}

    def close(self) -> None:
        self._closed = True
        if self._client is not None:
            self._client.close()

    @property
    def _api(self) -> Any:
        """The client; made when first needed, since it asks the engine for its version."""
        with self._connecting:
            if self._client is None:
                arguments = docker.utils.kwargs_from_env()
                self._client = docker.APIClient(
                    version="auto", timeout=CALL_SECONDS, max_pool_size=CONNECTIONS, num_pools=4, **arguments
                )
            return self._client

    def ping(self) -> None:
        with answering():
            self._api.ping()

    def capacity(self) -> Resources:
        with answering():
            info = self._api.info()
        root = Path(info.get("DockerRootDir", "/"))
        place = next(path for path in (root, *root.parents) if path.exists())
        return Resources(1000 * info["NCPU"], info["MemTotal"], psutil.disk_usage(str(place)).free, 0)

    # -- what there is

    def containers(self) -> list[Container]:
        with answering():
            found = self._api.containers(all=True, filters={"label": self._filter()})
            # The list tells no exit code; of a created or running one it tells all there is to know.
            return [
                container
                for each in found
                if (container := self.container(each["Names"][0].removeprefix("/"))) is not None
            ]

    def container(self, run_id: str) -> Container | None:
        with answering():
            try:
                found = self._api.inspect_container(run_id)
            except NotFound:
                return None
        return _container(found) if self._ours(found) else None

    def _filter(self) -> list[str]:
        return [f"{name}={value}" for name, value in self._labels.items()]

    def _ours(self, found: dict[str, Any]) -> bool:
        labels = found["Config"]["Labels"] or {}
        return TASK in labels and all(labels.get(name) == value for name, value in self._labels.items())

    # -- images

    def has_image(self, image: str) -> bool:
        return docker_images.has_image(self._api, image, self._settings.pull_policy)

    def pull(self, image: str, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        docker_images.pull(self._api, image, self._settings, progress, cancelled)

    # -- what is done

    def create(self, run: Run) -> None:
        with answering():
            try:
                self._api.create_container_from_config(self._config(run), name=run.run_id)
            except APIError as error:
                self._create_failed(run, error)

    def _create_failed(self, run: Run, error: APIError) -> None:
        if error.status_code == 409:
            if self.container(run.run_id) is not None:
                return  # made by this agent before it was killed
            text = f"A container that is not CloudAI's is called {run.run_id}; remove it, then submit the task again."
            raise RunRefused(Reason.START_FAILED, text) from None
        if error.status_code == 404:
            text = f"The image {run.image} is not on this worker and its pull policy is {self._settings.pull_policy}."
            raise RunRefused(Reason.IMAGE_NOT_FOUND, text) from None
        raise RunRefused(Reason.START_FAILED, f"The engine says: {engine_words(error)}") from None

    def _config(self, run: Run) -> dict[str, Any]:
        environment = {"CLOUDAI_TASK_ID": run.task_id, "CLOUDAI_ATTEMPT": str(run.attempt)}
        if run.gpus:
            environment["NVIDIA_VISIBLE_DEVICES"] = device_list(run.gpus)
        entrypoint: list[str] | None = None
        command: list[str] | None = None
        if isinstance(run.command, str):
            entrypoint, command = ["/bin/sh", "-c"], [run.command]
        elif run.command is not None:
            entrypoint, command = [run.command[0]], list(run.command[1:])
        return dict(
            self._api.create_container_config(
                run.image,
                command,
                entrypoint=entrypoint,
                environment=environment,
                labels={**self._labels, TASK: run.task_id, ATTEMPT: str(run.attempt)},
                host_config=self._host_config(run),
            )
        )

    def _host_config(self, run: Run) -> dict[str, Any]:
        settings = self._settings
        memory = max(run.resources.memory, LEAST_MEMORY)
        gpus = [str(share.device) for share in run.gpus]
        options = {
            "nano_cpus": run.resources.cpu * 1_000_000,
            "mem_limit": memory,
            "memswap_limit": memory,  # both together: no swap beyond the memory
            "pids_limit": settings.pids_limit,
            "init": True,
            "security_opt": ["no-new-privileges"],
            "cap_drop": [name.strip() for name in settings.cap_drop.split(",") if name.strip()],
            "network_mode": settings.network,
            "device_requests": [DeviceRequest(device_ids=gpus, capabilities=[["gpu"]])] if gpus else None,
            # A second file is kept when the first is full, so bytes that are not shipped yet outlive the turn.
            "log_config": {"type": "json-file", "config": {"max-size": self._log_size(), "max-file": "2"}},
        }
        return dict(
            self._api.create_host_config(**{name: value for name, value in options.items() if value is not None})
        )

    def _log_size(self) -> str:
        # JSON makes a byte six at most, and puts about 100 around each line.
        return str(self._settings.max_log_bytes * 2 + 1024 * 1024)

    def start(self, run_id: str) -> None:
        with answering():
            try:
                self._api.start(run_id)
            except APIError as error:
                words = engine_words(error)
                if _NO_COMMAND.search(words):
                    text = f"The image has no such command ({words}); check the spelling and what the image holds."
                    raise RunRefused(Reason.COMMAND_NOT_FOUND, text) from None
                raise RunRefused(Reason.START_FAILED, f"The engine says: {words}") from None

    def stop(self, run_id: str, grace_seconds: float) -> None:
        with answering(), contextlib.suppress(NotFound):
            self._api.stop(run_id, timeout=round(grace_seconds))

    def remove(self, run_id: str) -> None:
        with answering():
            try:
                self._api.remove_container(run_id, v=True)
            except NotFound:
                pass
            except APIError as error:
                if error.status_code != 409:  # somebody else is removing it
                    raise

    def storage_used(self) -> dict[str, int]:
        with answering():
            found = self._api.containers(all=True, size=True, filters={"label": self._filter()})
        return {each["Names"][0].removeprefix("/"): each.get("SizeRw") or 0 for each in found}

    # -- streams

    def read_log(self, run_id: str, offset: int) -> Iterator[bytes]:
        # Not the SDK's `logs`: it asks for the container first, and takes a broken connection for the end of the log.
        place = f"{self._api.base_url}/v{self._api.api_version}/containers/{run_id}/logs"
        arguments = {"stdout": 1, "stderr": 1, "follow": 1, "tail": "all"}
        with answering():
            response = self._api.get(place, params=arguments, stream=True, timeout=(CALL_SECONDS, None))
            if response.status_code == requests.codes.not_found:
                response.close()
                return
            response.raise_for_status()
            with contextlib.closing(response):
                skip = offset
                for piece in _payloads(response):
                    if skip >= len(piece):
                        skip -= len(piece)
                    else:
                        yield piece[skip:]
                        skip = 0

    def events(self) -> Iterator[str | None]:
        filters = {"type": ["container"], "label": self._filter(), "event": ["die", "destroy", "oom"]}
        while not self._closed:
            try:
                with answering():
                    events = self._api.events(decode=True, filters=filters)
                    yield None  # whatever happened while nobody listened
                    for event in events:
                        yield event["Actor"]["Attributes"]["name"]
            except EngineDown as error:
                log.debug("events: %s", error)
            if not self._closed:
                threading.Event().wait(RECONNECT_SECONDS)
                yield None


def _payloads(response: requests.Response) -> Iterator[bytes]:
    """The bytes of both streams, in the order in which the engine has them."""
    buffer = b""
    for data in response.iter_content(chunk_size=None):
        buffer += data
        while len(buffer) >= 8:
            size = int.from_bytes(buffer[4:8], "big")
            if len(buffer) < 8 + size:
                break
            yield buffer[8 : 8 + size]
            buffer = buffer[8 + size :]


def _container(found: dict[str, Any]) -> Container:
    state, labels = found["State"], found["Config"]["Labels"]
    ended = state["Status"] in ("exited", "dead", "removing")
    return Container(
        run_id=found["Name"].removeprefix("/"),
        task_id=labels[TASK],
        attempt=int(labels[ATTEMPT]),
        state=_STATES[state["Status"]],
        started_at=_milliseconds(state["StartedAt"]),
        finished_at=_milliseconds(state["FinishedAt"]) if ended else None,
        exit_code=state["ExitCode"] if ended else None,
        oom_killed=state["OOMKilled"],
        error=state["Error"] or None,
    )


def _milliseconds(text: str) -> int | None:
    """An engine's time, such as 2025-11-16T10:30:00.123456789Z; the year 1 means never."""
    if text.startswith("0001-"):
        return None
    whole, _, rest = text.rstrip("Z").partition(".")
    return round(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 1000 + int(f"{rest[:3]:0<3}")
