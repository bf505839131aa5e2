"""The OpenAPI 3.1 document, made from the models that validate; served at `/openapi.json` and kept in docs/openapi.json."""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from cloudai.api import models
from cloudai.api.operations import OPERATIONS, Operation
from cloudai.api.routing import Handler, Request
from cloudai.errors import HTTP_STATUS, MEANING, Code

_REF = "#/components/schemas/{model}"
_INFO = {
    "title": "CloudAI",
    "version": "1.0",
    "description": "Submit container tasks, follow them, and see the workers that run them.",
}
# What stands before every path may refuse a request.
_ANYWHERE = (Code.INVALID_REQUEST, Code.FORBIDDEN_HOST, Code.FORBIDDEN_ORIGIN, Code.INTERNAL, Code.UNAVAILABLE)
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


def document(*, whole_gpus: bool = False) -> dict[str, Any]:
    """The whole document as JSON values. `whole_gpus`: for a store that hands out no part of a GPU."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": _INFO,
        "paths": paths,
        "components": {"schemas": _schemas(whole_gpus)},
    }


def _schemas(whole_gpus: bool) -> dict[str, Any]:
    bodies: list[tuple[type[BaseModel], Any]] = [(models.TaskRequest, "validation")]
    answers = {operation.answer for operation in OPERATIONS if operation.answer} | {models.ErrorAnswer}
    bodies += [(model, "serialization") for model in sorted(answers, key=lambda model: model.__name__)]
    _, definitions = models_json_schema(bodies, ref_template=_REF)
    schemas: dict[str, Any] = definitions["$defs"]
    if whole_gpus:
        schemas["TaskRequest"]["properties"]["req_gpu"]["multipleOf"] = 1
    schemas["ErrorBody"]["properties"]["code"]["enum"] = [code.value for code in Code]
    return dict(sorted(schemas.items()))


def _operation(it: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": it.name,
        "summary": it.summary,
        "description": it.description,
        "tags": [it.tag],
        "responses": _responses(it),
    }
    if parameters := [*it.path_parameters(), *_query(it.query), *it.headers]:
        described["parameters"] = parameters
    if it.body:
        content = {"schema": {"$ref": _REF.format(model=it.body.__name__)}, "example": it.example}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _query(model: type[BaseModel]) -> list[dict[str, Any]]:
    schema: dict[str, Any] = model.model_json_schema(ref_template=_REF)
    parameters = []
    for name, field in schema.get("properties", {}).items():
        told = {key: value for key, value in field.items() if key not in ("description", "title")}
        told = _without_null(told)
        if "$ref" in told:
            told = {"$ref": _REF.format(model="TaskStatus")}
        parameters.append({"name": name, "in": "query", "description": field["description"], "schema": told})
    return parameters


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query parameter is absent or has a value; null is a matter of JSON."""
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        rest: dict[str, Any] = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return {**rest, **choices[0]}
    return schema


def _responses(it: Operation) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": it.success()}
    by_status: dict[int, list[Code]] = {}
    for code in sorted({*it.errors, *_ANYWHERE}, key=lambda code: (HTTP_STATUS[code], code)):
        by_status.setdefault(HTTP_STATUS[code], []).append(code)
    for status, codes in by_status.items():
        answer: dict[str, Any] = {
            "description": " ".join(f"`{code}`: {MEANING[code]}" for code in codes),
            "content": {"application/json": {"schema": {"$ref": _REF.format(model="ErrorAnswer")}}},
        }
        if status in (429, 503):
            answer["headers"] = _RETRY_AFTER
        responses[str(status)] = answer
    if it.also_503:
        responses["503"]["content"]["application/json"]["schema"] = {
            "anyOf": [{"$ref": _REF.format(model=name)} for name in (it.also_503.__name__, "ErrorAnswer")]
        }
    return responses


@cache
def encoded(whole_gpus: bool) -> bytes:
    return orjson.dumps(document(whole_gpus=whole_gpus))


def page(*, whole_gpus: bool) -> Handler:
    """What answers with the document."""

    async def serve(_: Request) -> Response:
        return Response(encoded(whole_gpus), media_type="application/json")

    return serve
