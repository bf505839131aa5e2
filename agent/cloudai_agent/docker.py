"""Containers in a Docker Engine, through the `docker` SDK's low-level client.

Labels are what makes a container ours: cluster, worker, task and attempt. One that lacks them is never listed, never
stopped, never removed, whatever its name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import docker
import psutil
import requests
from docker.errors import APIError, NotFound, create_api_error_from_http_exception

from cloudai.resources import Reason, Resources, Run
from cloudai.settings import Settings
from cloudai_agent import docker_images
from cloudai_agent.docker_calls import (
    CALL_SECONDS,
    KeptAlive,
    answering,
    engine_words,
    going_away,
    shut,
    stream_payloads,
)
from cloudai_agent.docker_config import CLUSTER, TASK, WORKER, Engine, container_config, container_of, start_refusal
from cloudai_agent.runtime import Container, ContainerState, EngineDown, RunRefused, engine_says

log = logging.getLogger("cloudai.agent")

PING_SECONDS = 10
RECONNECT_SECONDS = 1.0
LOOK_SECONDS = 0.05  # between looks at a container whose log broke off
LOG_TRIES, LOG_TRY_SECONDS = 10, 1.0  # for the log of an ended container that the engine refuses to give
REPLAY_SECONDS = 5  # events of so long before a connection are asked for again, so that none falls into the gap
CONNECTIONS = 256  # one for each call under way and each log that is followed


class DockerRuntime:
    """Implements Runtime. The engine is the one that DOCKER_HOST names, or the local socket."""

    kind: Literal["docker", "process"] = "docker"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._labels: dict[str, str] = {}
        self._client: Any = None  # docker.APIClient, whose types are partly unknown
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listening: Any = None  # the stream of events
        # Engine ids of our containers: what is done to one is done to its id, so never to another of the same name.
        self._ids: dict[str, str] = {}
        self._fresh: set[str] = set()  # runs created by this process and not started yet

    def bind(self, cluster_id: str, worker_id: str) -> None:
        self._labels = {CLUSTER: cluster_id, WORKER: worker_id}
        self._ids.clear()

    def close(self) -> None:
        self._closed.set()
        if self._listening is not None:
            shut(self._listening)
        if self._client is not None:
            self._client.close()

    @property
    def _api(self) -> Any:
        """The client; made when first needed, since it asks the engine for its version. Raises EngineDown."""
        with self._lock:
            if self._client is None:
                arguments = docker.utils.kwargs_from_env()
                with answering():
                    client = docker.APIClient(
                        version="auto", timeout=PING_SECONDS, max_pool_size=CONNECTIONS, num_pools=4, **arguments
                    )
                client.timeout = CALL_SECONDS  # once it has said its version
                if client.base_url.startswith(("http://", "https://")):
                    client.get_adapter(client.base_url).close()
                    client.mount(client.base_url, KeptAlive(pool_maxsize=CONNECTIONS))
                self._client = client
            return self._client

    def _place(self, path: str) -> str:
        return f"{self._api.base_url}/v{self._api.api_version}{path}"

    def ping(self) -> None:
        with answering():
            self._api.get(self._place("/_ping"), timeout=PING_SECONDS).raise_for_status()

    def capacity(self) -> Resources:
        with answering():
            info = self._api.info()
        root = Path(info.get("DockerRootDir", "/"))
        self._engine = Engine.of(info)
        place = next(path for path in (root, *root.parents) if path.exists())
        return Resources(1000 * info["NCPU"], info["MemTotal"], psutil.disk_usage(str(place)).free, 0)

    # -- what there is

    def containers(self) -> list[Container]:
        with answering():
            found = self._api.containers(all=True, filters={"label": self._filter()})
            # The list tells no exit code; of a created or running one it tells all there is to know.
            return [container for name in _names(found) if (container := self.container(name)) is not None]

    def container(self, run_id: str) -> Container | None:
        with answering():
            try:
                found = self._api.inspect_container(run_id)
            except NotFound:
                found = None
        if found is None or not self._ours(found):
            self._ids.pop(run_id, None)
            return None
        self._ids[run_id] = found["Id"]
        return container_of(found)

    def _id(self, run_id: str) -> str | None:
        """The engine's id of one of ours, None where there is none of that name."""
        if run_id not in self._ids:
            self.container(run_id)
        return self._ids.get(run_id)

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
        if isinstance(run.command, tuple) and not run.command[0]:  # the engine would speak of none
            raise RunRefused(Reason.COMMAND_NOT_FOUND, "An empty string is no program; give the task a command.")
        with answering():
            if self._engine is None:
                self._engine = Engine.of(self._api.info())
            config = container_config(self._api, run, self._settings, self._labels, self._engine)
            try:
                self._ids[run.run_id] = self._api.create_container_from_config(config, name=run.run_id)["Id"]
                self._fresh.add(run.run_id)
            except APIError as error:
                if going_away(error):
                    raise
                self._create_failed(run, error)

    def _create_failed(self, run: Run, error: APIError) -> None:
        words = engine_words(error)
        reason, text = Reason.START_FAILED, engine_says(words)
        if error.status_code == requests.codes.conflict:
            if self.container(run.run_id) is not None:
                return  # made by this agent before it was killed
            text = f"A container that is not CloudAI's is called {run.run_id}; remove it, then submit the task again."
        elif error.status_code == requests.codes.not_found:
            reason = Reason.IMAGE_NOT_FOUND
            text = f"The image {run.image} is not on this worker any more; submit the task again."
        elif "invalid reference" in words:
            reason, text = Reason.INVALID_IMAGE_NAME, f"{run.image} is no image name ({words}); correct it."
        elif "no command specified" in words.lower():
            text = f"The image {run.image} has no command of its own; give the task a command."
        raise RunRefused(reason, text) from None

    def start(self, run_id: str) -> None:
        if run_id not in self._fresh:
            container = self.container(run_id)
            if container is None:
                raise RunRefused(Reason.START_FAILED, f"The container {run_id} is gone; submit the task again.")
            if container.state is not ContainerState.CREATED:
                return  # the engine would run what has ended once more
        self._fresh.discard(run_id)
        with answering():
            try:
                self._api.start(self._ids[run_id])
            except APIError as error:
                if going_away(error):
                    raise
                there = self.container(run_id)
                if there is not None and there.state is not ContainerState.CREATED:
                    return  # it did start, whatever went wrong afterwards
                refusal = start_refusal(engine_words(error))
                raise RunRefused(refusal.reason, refusal.message) from None

    def stop(self, run_id: str, grace_seconds: float) -> None:
        identity = self._id(run_id)
        if identity is not None:
            with answering(), contextlib.suppress(NotFound):
                self._api.stop(identity, timeout=math.ceil(grace_seconds))

    def remove(self, run_id: str) -> None:
        identity = self._id(run_id)
        if identity is None:
            return
        with answering():
            try:
                self._api.remove_container(identity, v=True)
            except NotFound:
                pass
            except APIError as error:
                if "is already in progress" not in engine_words(error):  # by somebody else
                    raise
        self._ids.pop(run_id, None)
        self._fresh.discard(run_id)

    def storage_used(self) -> dict[str, int]:
        with answering():
            found = self._api.containers(all=True, size=True, filters={"label": self._filter()})
        return {name: each.get("SizeRw") or 0 for name, each in _names(found).items()}

    # -- streams

    def read_log(self, run_id: str, offset: int) -> Iterator[bytes]:
        identity = self._id(run_id)
        if identity is None:
            return
        follow, refusals = True, 0
        while not self._closed.is_set():
            refused = None
            try:
                for piece in self._log_from(identity, offset, follow=follow):
                    offset += len(piece)
                    yield piece
            except APIError as error:
                refused = engine_words(error)
            if not follow and not refused:
                return
            container = self.container(run_id)
            if container is None:
                return
            if container.state is ContainerState.RUNNING:  # the engine closes the log a moment before it tells the end
                self._closed.wait(LOG_TRY_SECONDS if refused else LOOK_SECONDS)
                continue
            if refused and not follow:
                refusals += 1
                if refusals == LOG_TRIES:
                    yield f"\n[cloudai: the engine does not give the rest of the log: {refused}]\n".encode()
                    return
                self._closed.wait(LOG_TRY_SECONDS)
            follow = False  # a followed log may lack its last bytes (a race in the engine), so they are read now
        raise EngineDown("The connection to the Docker engine was closed")

    def _log_from(self, identity: str, offset: int, *, follow: bool) -> Iterator[bytes]:
        # Not the SDK's `logs`: it asks for the container first, and takes a broken connection for the end of the log.
        arguments = {"stdout": 1, "stderr": 1, "follow": int(follow), "tail": "all"}
        with answering():
            place = self._place(f"/containers/{identity}/logs")
            response = self._api.get(place, params=arguments, stream=True, timeout=(CALL_SECONDS, None))
            with contextlib.closing(response):
                if response.status_code == requests.codes.not_found:
                    return
                try:
                    response.raise_for_status()
                except requests.HTTPError as error:
                    create_api_error_from_http_exception(error)
                for piece in stream_payloads(response):
                    if offset < len(piece):
                        yield piece[offset:]
                    offset = max(0, offset - len(piece))

    def events(self) -> Iterator[str | None]:
        filters = {"type": ["container"], "label": self._filter(), "event": ["die", "destroy", "oom"]}
        while not self._closed.is_set():
            try:
                with answering():
                    since = int(time.time()) - REPLAY_SECONDS
                    arguments = {"filters": docker.utils.convert_filters(filters), "since": since}
                    response = self._api.get(
                        self._place("/events"), params=arguments, stream=True, timeout=(CALL_SECONDS, None)
                    )
                    with contextlib.closing(response):
                        response.raise_for_status()
                        self._listening = response
                        yield None  # whatever happened while nobody listened
                        for line in response.iter_lines(chunk_size=None):
                            yield json.loads(line)["Actor"]["Attributes"]["name"]
            except EngineDown as error:
                log.debug("events: %s", error)
            self._listening = None
            if not self._closed.wait(RECONNECT_SECONDS):
                yield None


def _names(found: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Containers of a list by name. One that is being removed may have lost its name already, and is nobody's any more."""
    return {each["Names"][0].removeprefix("/"): each for each in found if each.get("Names")}
