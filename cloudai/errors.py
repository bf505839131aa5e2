"""Every error a client can meet, and the one table of code and HTTP status.

The facade encodes with this table, the HTTP client decodes with it, the OpenAPI document lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """Stable names for programs; a message for people goes beside each."""

    INVALID_REQUEST = "INVALID_REQUEST"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN_HOST = "FORBIDDEN_HOST"
    FORBIDDEN_ORIGIN = "FORBIDDEN_ORIGIN"
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    ATTEMPT_NOT_FOUND = "ATTEMPT_NOT_FOUND"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    TASK_FINISHED = "TASK_FINISHED"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    LOGS_REMOVED = "LOGS_REMOVED"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    RATE_LIMITED = "RATE_LIMITED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"


HTTP_STATUS: Mapping[Code, int] = {
    Code.INVALID_REQUEST: 400,
    Code.UNAUTHORIZED: 401,
    Code.FORBIDDEN_HOST: 403,
    Code.FORBIDDEN_ORIGIN: 403,
    Code.TASK_NOT_FOUND: 404,
    Code.WORKER_NOT_FOUND: 404,
    Code.ATTEMPT_NOT_FOUND: 404,
    Code.ROUTE_NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.TASK_FINISHED: 409,
    Code.IDEMPOTENCY_CONFLICT: 409,
    Code.LOGS_REMOVED: 410,
    Code.BODY_TOO_LARGE: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.RATE_LIMITED: 429,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
}


MEANING: Mapping[Code, str] = {
    Code.INVALID_REQUEST: "A field, query parameter or the JSON itself is wrong; `details` names the `field` and the `reason`.",
    Code.UNAUTHORIZED: "An agent's join token is missing or unknown.",
    Code.FORBIDDEN_HOST: "The Host header is not one of a server bound to loopback; see `CLOUDAI_ALLOWED_HOSTS`.",
    Code.FORBIDDEN_ORIGIN: "A browser sent this for a page of another site; see `CLOUDAI_ALLOWED_HOSTS`.",
    Code.TASK_NOT_FOUND: "There is no such task, or retention removed it.",
    Code.WORKER_NOT_FOUND: "No worker of this name has joined, or retention removed it.",
    Code.ATTEMPT_NOT_FOUND: "The task has no such attempt, or has not been placed yet.",
    Code.ROUTE_NOT_FOUND: "No such path.",
    Code.METHOD_NOT_ALLOWED: "The path exists, but not with this method; the `Allow` header lists those it has.",
    Code.TASK_FINISHED: "The task has completed or failed, so it cannot be cancelled.",
    Code.IDEMPOTENCY_CONFLICT: "This `Idempotency-Key` came before with another body.",
    Code.LOGS_REMOVED: "The logs are there no more: retention removed them, or on Kubernetes they went with their Pod.",
    Code.BODY_TOO_LARGE: "The body is larger than `CLOUDAI_MAX_BODY_BYTES`.",
    Code.UNSUPPORTED_MEDIA_TYPE: "A body must come with `Content-Type: application/json`.",
    Code.RATE_LIMITED: "Too many requests from this address; `Retry-After` says when to go on.",
    Code.INTERNAL: "A fault in the server; its log has the cause.",
    Code.UNAVAILABLE: "The store cannot be reached or written now. Nothing was half done, but a change may have "
    "been stored where only its answer was lost: send the same request again, a submit with its `Idempotency-Key`.",
}


class CloudAIError(Exception):
    """An error with a place in the documented envelope.

    `details` is a flat object of JSON values, such as `{"field": "req_cpu", "reason": "must be greater than 0"}`.
    `retry_after` in whole seconds becomes the Retry-After header.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        details: Mapping[str, Any] | None = None,
        *,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = dict(details or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        """For logs: what is behind it, where there is something; the message speaks to clients of the API."""
        return str(self.details.get("reason", self.message))

    @property
    def http_status(self) -> int:
        return HTTP_STATUS[self.code]


def invalid(field: str, reason: str, message: str = "Invalid request parameters") -> CloudAIError:
    """The documented 400: which field, and what is wrong with it."""
    return CloudAIError(Code.INVALID_REQUEST, message, {"field": field, "reason": reason})


def task_not_found(task_id: str) -> CloudAIError:
    return CloudAIError(Code.TASK_NOT_FOUND, "Task not found", {"task_id": task_id})


def unavailable(reason: str) -> CloudAIError:
    """The store cannot be written or read right now, or does not say what became of a write. Nothing was half done."""
    return CloudAIError(
        Code.UNAVAILABLE,
        "The service cannot reach its store right now; send the same request again shortly, a submit with its Idempotency-Key",
        {"reason": reason},
        retry_after=1,
    )
