"""Requests to the Kubernetes API server, in plain JSON.

The official client reads the configuration (a kubeconfig, or the service account inside a cluster), knows whom to trust and
keeps the credentials fresh; its typed models and what it does around each request, half a millisecond each, are not used.
Every object that is made has a computed name, so that a request may be sent again after a fault: a create that has been done
already says 409.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import getproxies

import aiohttp
import orjson
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.kube_config import ENV_KUBECONFIG_PATH_SEPARATOR, KUBE_CONFIG_DEFAULT_LOCATION
from yaml import YAMLError

from cloudai.errors import CloudAIError, unavailable
from cloudai.settings import Settings
from cloudai.store.kube.denial import denied
from cloudai.store.kube.task_resource import GROUP, Json

PATIENCE = 10.0  # seconds a request is tried again after faults that pass
NO_LOG_SECONDS = 1.0  # after which a 500 is believed of a log: a kubelet that has none says that, too
ONE_TRY = 30.0  # seconds that one try may take
ENDLESS = aiohttp.ClientTimeout(total=None, sock_connect=10)  # what each try may take is limited here, to the moment
LONGEST_PAUSE = 2.0
CONNECTIONS = 256
READ_AHEAD = 2**21  # bytes: an event of a watch may be large
PAGE = 500
MOST_CONFLICTS = 8
MERGE = "application/merge-patch+json"


class NoCluster(Exception):
    """The settings lead to no cluster; the words say what to change."""


_PASSING = frozenset({429, 500, 502, 503, 504})
_FAULTS = (
    aiohttp.ClientError,
    TimeoutError,
    OSError,
    ConfigException,
    NoCluster,
)  # the last two of a kubeconfig, or an account's files, that give no credentials any more
_T = TypeVar("_T")


class ApiError(Exception):
    """The API server's refusal: its HTTP status, its reason (`AlreadyExists`, `Conflict`, …) and its words."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        self.status = status
        self.reason = str(document.get("reason") or "")
        self.message = str(document.get("message") or f"HTTP {status}")
        self.details: Mapping[str, Any] = document.get("details") or {}
        super().__init__(f"{status} {self.reason}: {self.message}")

    @property
    def already_exists(self) -> bool:
        """Whether the name is taken; a policy that refuses may give the same reason."""
        return self.reason == "AlreadyExists" and not denied(self.message)


class Lacking(ApiError):
    """The cluster has not what it takes to keep Tasks; the message says what to do."""

    def __init__(self, words: str) -> None:
        super().__init__(404, {"reason": "NotFound", "message": words})


class NoResource(Lacking):
    """The cluster does not know Tasks at all."""

    def __init__(self) -> None:
        super().__init__("the cluster has no Task resource: install the chart, or apply manifests/crds")


class NoNamespace(Lacking):
    """The cluster has no namespace of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the cluster has no namespace {name}; make it, or name another with --namespace")


class Endpoint:
    """Where the API server is and who asks; and the connections to it."""

    def __init__(self, configuration: Configuration, settings: Settings) -> None:
        self.configuration = configuration
        self._settings = settings
        self._renewing = asyncio.Lock()
        trust = RESTClientObject(configuration)
        self.requests, self.streams = _session(trust), _session(trust)

    async def credential(self) -> str | None:
        """What the Authorization header says."""
        return await self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")

    async def renewed(self, refused: str | None) -> bool:
        """Whether there is another credential than the `refused` one: tokens of a kubeconfig's programs and files run out."""
        async with self._renewing:
            if await self.credential() == refused:
                await _configure(self.configuration, self._settings)
            return await self.credential() != refused


class Api:
    """Made by `connect`. Every method raises ApiError for a refusal and `unavailable` when the server cannot be had.

    Streams have connections of their own: however many logs are followed, requests do not wait for them.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        one_try: float = ONE_TRY,
        patience: float = PATIENCE,
        before_write: Callable[[], float] = lambda: ONE_TRY,
    ) -> None:
        self._endpoint = endpoint
        self._one_try = one_try
        self._patience = patience
        self._before_write = before_write

    def bound(
        self,
        *,
        one_try: float = ONE_TRY,
        patience: float = PATIENCE,
        before_write: Callable[[], float] = lambda: ONE_TRY,
    ) -> Api:
        """The same server with other limits, in seconds. `before_write` is asked before each try of a write: it returns
        the seconds that the try may take, or raises to keep it from being sent.
        """
        return Api(self._endpoint, one_try=one_try, patience=patience, before_write=before_write)

    @property
    def configuration(self) -> Configuration:
        """Where the API server is and who asks; its credentials are kept fresh."""
        return self._endpoint.configuration

    async def credential(self) -> str | None:
        """What the Authorization header says."""
        return await self._endpoint.credential()

    async def close(self) -> None:
        """End every connection."""
        await self._endpoint.requests.close()
        await self._endpoint.streams.close()

    async def get(self, path: str, **query: str | int) -> Json:
        """One object, or what else is at that path."""
        return await self._json("GET", path, query)

    async def create(self, path: str, body: Json) -> Json:
        """The object as it was stored. Raises ApiError `AlreadyExists`; another conflict, such as one about a quota's count, is
        the server's own and passes.
        """
        return await self._settled("POST", path, body, lambda error: error.already_exists)

    async def patch(self, path: str, body: Json) -> Json:
        """A JSON merge patch, the one kind that custom resources know too. With a resource version in it: compared; without
        one a conflict is the server's own, between its read and its write, and passes.
        """
        compared = "resourceVersion" in body.get("metadata", {})
        return await self._settled("PATCH", path, body, lambda _: compared)

    async def replace(self, path: str, body: Json) -> Json:
        """An object, or its status, by a whole other one; compared by the resource version in it."""
        return await self._json("PUT", path, {}, body)

    async def delete(self, path: str, uid: str | None = None) -> Json:
        """Ask for the end of an object: of exactly that `uid`."""
        options: Json = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        return await self._json("DELETE", path, {}, options)

    async def pages(self, path: str, **query: str | int) -> AsyncIterator[tuple[list[Json], str]]:
        """Every object, in pages, each with the version of the whole list; objects come and go with their page."""
        asked: dict[str, str | int] = {"limit": PAGE, **query}
        while True:
            page = await self.get(path, **asked)
            yield page["items"], page["metadata"]["resourceVersion"]
            if not page["metadata"].get("continue"):
                return
            asked["continue"] = page["metadata"]["continue"]
            asked.pop("resourceVersion", None)  # a later page keeps to the first one's

    @contextlib.asynccontextmanager
    async def stream(self, path: str, **query: str | int) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of an answer that goes on: a watch, a log. Raises also what aiohttp raises when it breaks off."""
        response = await self._answered(self._endpoint.streams, "GET", path, query, None, _itself)
        try:
            yield response.content
        finally:
            _hang_up(response)

    async def _settled(self, method: str, path: str, body: Json, lasts: Callable[[ApiError], bool]) -> Json:
        """Sent again after a conflict that does not last; what a policy calls one does."""
        tries = 0
        while True:
            try:
                return await self._json(method, path, {}, body)
            except ApiError as error:
                tries += 1
                if error.status != 409 or denied(error.message) or lasts(error) or tries == MOST_CONFLICTS:
                    raise
            await asyncio.sleep(_pause(tries))

    async def _json(self, method: str, path: str, query: Mapping[str, str | int], body: Json | None = None) -> Json:
        return _document(await self._answered(self._endpoint.requests, method, path, query, body, _body))

    async def _answered(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Json | None,
        taken: Callable[[aiohttp.ClientResponse], Awaitable[_T]],
    ) -> _T:
        """What is `taken` from the answer, tried again after faults that pass."""
        clock = asyncio.get_running_loop().time
        began, tries, streams, renewed = clock(), 0, session is self._endpoint.streams, False
        while True:
            tries += 1
            seconds = self._one_try if method == "GET" else min(self._one_try, self._before_write())
            try:
                async with asyncio.timeout(seconds):
                    credential = await self._endpoint.credential()
                    response = await self._send(session, method, path, query, body, credential)
                    if response.status < 400:
                        return await taken(response)
                    refusal = _refusal(path, response.status, _document(await _body(response)))
                    if refusal.status == 401 and not renewed:  # once: a program may give another one each time
                        renewed = await self._endpoint.renewed(credential)
                        if renewed:
                            continue
            except _FAULTS as error:
                pause, words = _pause(tries), f"the Kubernetes API cannot be reached: {_words(error)}"
            else:
                no_log = streams and response.status == 500 and clock() - began > NO_LOG_SECONDS
                if no_log or response.status not in _PASSING or "webhook" in refusal.message:  # whose fault may last
                    raise refusal
                pause, words = _asked_pause(response) or _pause(tries), f"the Kubernetes API says {refusal}"
            if clock() + pause - began > self._patience:
                raise unavailable(words)
            await asyncio.sleep(pause)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Json | None,
        credential: str | None,
    ) -> aiohttp.ClientResponse:
        configuration = self._endpoint.configuration
        headers = {"Content-Type": MERGE if method == "PATCH" else "application/json"}
        if credential:
            headers["Authorization"] = credential
        return await session.request(
            method,
            configuration.host + path,
            params=query or None,
            data=None if body is None else orjson.dumps(body),
            headers=headers,
            server_hostname=configuration.tls_server_name or None,
        )


async def connect(settings: Settings) -> Api:
    """Raises NoCluster where neither a kubeconfig nor a service account leads anywhere."""
    configuration = Configuration()
    await _configure(configuration, settings)
    return Api(Endpoint(configuration, settings))


async def _configure(configuration: Configuration, settings: Settings) -> None:
    try:
        if settings.kubeconfig is not None and not settings.kubeconfig.is_file():
            raise NoCluster(f"--kubeconfig {settings.kubeconfig}: no such file")
        if settings.kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            path = None if settings.kubeconfig is None else str(settings.kubeconfig)
            if path is None and not _default_kubeconfig():
                raise ConfigException("there is no kubeconfig")
            await config.load_kube_config(config_file=path, client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError, ValueError, TypeError, AttributeError, KeyError, YAMLError) as error:
        words = (
            _words(error) if isinstance(error, ConfigException) else f"{settings.kubeconfig or 'it'} is no kubeconfig"
        )
        raise NoCluster(f"no Kubernetes cluster: {words}; name a kubeconfig with --kubeconfig or KUBECONFIG") from None


def _default_kubeconfig() -> bool:
    return any(Path(place).is_file() for place in KUBE_CONFIG_DEFAULT_LOCATION.split(ENV_KUBECONFIG_PATH_SEPARATOR))


def _session(trust: RESTClientObject) -> aiohttp.ClientSession:
    """Connections that trust whom the configuration trusts. The API server notes the first word of the agent as the one who
    wrote a field.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=trust.ssl_context),
        headers={"Accept": "application/json", "User-Agent": f"cloudai/{version('cloudai')}"},
        read_bufsize=READ_AHEAD,
        timeout=ENDLESS,
        proxy=trust.proxy,
        # Only where it says something: aiohttp would read the environment and ~/.netrc anew for every request.
        trust_env=bool(getproxies()),
    )


def _refusal(path: str, status: int, document: Json) -> ApiError:
    error = ApiError(status, document)
    if status == 404 and "page not found" in error.message and path.startswith(f"/apis/{GROUP}/"):
        return NoResource()
    if status == 404 and error.details.get("kind") == "namespaces":
        return NoNamespace(error.details.get("name", ""))
    return error


def as_unavailable(error: ApiError) -> CloudAIError:
    """For whoever has no other answer to a refusal."""
    return unavailable(error.message if isinstance(error, Lacking) else f"the Kubernetes API says {error}")


async def _body(response: aiohttp.ClientResponse) -> bytes:
    async with response:
        return await response.read()


async def _itself(response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
    return response


def _hang_up(response: aiohttp.ClientResponse) -> None:
    """End the connection at once: TLS's farewell has nobody who waits for it, and would outlive the client's own end."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    response.close()


def _document(data: bytes) -> Json:
    """What the server said; HTML of something in between counts as nothing said."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {"message": data[:200].decode(errors="replace").strip()}
    return document if isinstance(document, dict) else {}


def _pause(tries: int) -> float:
    """Seconds until the next try: longer each time, and not the same for every client."""
    return min(LONGEST_PAUSE, 0.05 * 2.0**tries) * random.uniform(0.5, 1.0)


def _asked_pause(response: aiohttp.ClientResponse) -> float | None:
    """The server's own wish in Retry-After; a moment more, so that not all come at once."""
    text = response.headers.get("Retry-After", "")
    return float(text) * random.uniform(1.0, 1.5) if text.isdecimal() and len(text) < 4 else None


def _words(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
