"""Pulling images: with progress, within a time, given up when nobody wants it any more."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import requests
from docker import auth
from docker.errors import APIError, DockerException, ImageNotFound
from docker.utils import parse_repository_tag

from cloudai.resources import Reason
from cloudai.settings import Settings
from cloudai_agent.docker_calls import CALL_SECONDS, answering, engine_words, going_away, shut
from cloudai_agent.runtime import RunRefused

LOOK_SECONDS = 0.1  # how often a silent pull is asked whether it is still wanted
_END = object()


def has_image(api: Any, image: str, policy: str) -> bool:
    """True when nothing is to be pulled; raises RunRefused where the policy is never to pull and the image is missing."""
    if policy == "always":
        return False
    with answering():
        try:
            api.inspect_image(image)
        except ImageNotFound:
            if policy == "never":
                text = (
                    f"The image {image} is not on this worker, and its pull policy is never to pull; load it there, or set"
                    " CLOUDAI_PULL_POLICY=missing for the agent."
                )
                raise RunRefused(Reason.IMAGE_NOT_FOUND, text) from None
            return False
        except APIError as error:
            if going_away(error):
                raise
            raise refusal(image, engine_words(error)) from None
    return True


def pull(
    api: Any,
    image: str,
    settings: Settings,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> None:
    """Raises RunRefused for what the registry says, ImagePullTimeout after the setting's time."""
    deadline = time.monotonic() + settings.pull_timeout_seconds
    layers: dict[str, tuple[int, int]] = {}
    for line in _lines(api, image, deadline, cancelled):
        if line is None:
            if cancelled():
                return
            if time.monotonic() >= deadline:
                text = (
                    f"Pulling {image} took longer than {settings.pull_timeout_seconds:g} s; check the registry and the"
                    " network, or raise the worker's pull timeout."
                )
                raise RunRefused(Reason.IMAGE_PULL_TIMEOUT, text)
            if layers:  # who hears of it only now and then shall hear of the last before a silence, too
                progress(_summary(image, layers))
            continue
        if "error" in line:
            raise refusal(image, str(line["error"]))
        detail = line.get("progressDetail") or {}
        if "total" in detail:
            layers[line["id"]] = (detail.get("current", 0), detail["total"])
            progress(_summary(image, layers))


def _lines(api: Any, image: str, deadline: float, cancelled: Callable[[], bool]) -> Iterator[dict[str, Any] | None]:
    """The engine's progress lines as they come, None in between; the stream is read by a thread, for it may be silent.

    Letting go of the stream is how the engine learns that nobody wants the image any more.
    """
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream: list[requests.Response] = []
    given_up = threading.Event()

    def read() -> None:
        try:
            with answering(), contextlib.closing(_request(api, image)) as response:
                stream.append(response)
                for line in response.iter_lines(chunk_size=None):
                    lines.put(json.loads(line))
                    if given_up.is_set():
                        return
            lines.put(_END)
        except Exception as error:  # noqa: BLE001 - told to who waits, whatever it is
            lines.put(error)

    threading.Thread(target=read, name="pull", daemon=True).start()
    try:
        while True:
            if cancelled() or time.monotonic() >= deadline:
                yield None
            try:
                line = lines.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if line is _END:
                return
            if isinstance(line, APIError):
                raise refusal(image, engine_words(line), missing=line.status_code == requests.codes.not_found)
            if isinstance(line, Exception):
                raise line
            yield line
    finally:
        given_up.set()
        for response in stream:
            shut(response)


def _request(api: Any, image: str) -> requests.Response:
    """Ask for the image. The SDK's own `pull` gives no hold of the connection."""
    repository, tag = parse_repository_tag(image)  # without a tag the engine would pull every tag there is
    registry, _ = auth.resolve_repository_name(repository)
    login = None
    with contextlib.suppress(DockerException):  # an unreadable file or a helper that is not there holds no login
        api.reload_config()  # a `docker login` since the agent started counts
        login = auth.get_config_header(api, registry)
    response: requests.Response = api.post(
        f"{api.base_url}/v{api.api_version}/images/create",
        params={"fromImage": repository, "tag": tag or "latest"},
        headers={"X-Registry-Auth": login} if login else {},
        stream=True,
        timeout=(CALL_SECONDS, None),
    )
    if response.status_code >= requests.codes.bad_request:
        with contextlib.closing(response):
            raise APIError("refused", response, response.json().get("message"))
    return response


def refusal(image: str, words: str, *, missing: bool = False) -> RunRefused:
    """The engine's words about an image as a reason."""
    low = words.lower()
    if "invalid reference" in low or "invalid repository name" in low:
        return RunRefused(Reason.INVALID_IMAGE_NAME, f"{image} is no image name ({words}); correct it.")
    if missing or "manifest unknown" in low or "repository name not known" in low:
        # A registry does not tell an image that is missing from one that is not shown.
        hint = "log in on the worker with `docker login` if it is private" if "denied" in low else "check name and tag"
        return RunRefused(Reason.IMAGE_NOT_FOUND, f"The registry has no image {image} ({words}); {hint}.")
    login = any(sign in low for sign in ("denied", "unauthorized", "authentication", "no basic auth"))
    hint = "log in on the worker with `docker login`" if login else "check the registry and the worker's network"
    return RunRefused(Reason.IMAGE_PULL_FAILED, f"Pulling {image} failed ({words}); {hint}.")


def _summary(image: str, layers: dict[str, tuple[int, int]]) -> str:
    done = sum(current for current, _ in layers.values()) / 1e6
    total = sum(total for _, total in layers.values()) / 1e6
    return f"Pulling {image}: {done:.0f} of {total:.0f} MB in {len(layers)} layers"
