"""Bodies and queries through the models, and what is wrong with them in the documented words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cloudai.api.models import IMAGE, NO_NUL, USER
from cloudai.errors import CloudAIError, invalid

M = TypeVar("M", bound=BaseModel)

_PATTERNS = {
    IMAGE: "must be an image reference such as docker.io/library/ubuntu:latest",
    USER: "must not have control characters, or blanks at its ends",
    NO_NUL: "must not contain NUL",
}
_TYPES = {
    "string_type": "must be a string",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
    "missing": "is required",
    "int_parsing_size": "is too large",
}
_WRONG_TYPE = frozenset({"string_type", "list_type"})


def body(model: type[M], data: bytes) -> M:
    """`data` as `model`. Raises INVALID_REQUEST that names the field and the reason."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(model, error, "field") from None


def query(model: type[M], query_string: bytes) -> M:
    """A query string as `model`; an unknown or repeated parameter is refused."""
    if not query_string:
        return model()
    given: dict[str, str] = {}
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50, encoding="utf-8"
        )
    except ValueError:
        raise invalid("query", "is not a proper UTF-8 query string", "Invalid query parameters") from None
    for name, value in pairs:
        if name in given:
            raise invalid(name, "is given more than once", "Invalid query parameters")
        given[name] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _refusal(model, error, "parameter") from None


def _refusal(model: type[BaseModel], error: ValidationError, what: str) -> CloudAIError:
    wrong = _most_telling(error.errors(include_url=False, include_context=True))
    message = "Invalid query parameters" if what == "parameter" else "Invalid request parameters"
    kind = wrong["type"]
    if kind == "json_invalid":
        return invalid("body", f"is not valid JSON: {_context(wrong).get('error', wrong['msg'])}", message)
    if not wrong["loc"]:
        return invalid("body", "must be a JSON object", message)
    if kind == "extra_forbidden":
        name = str(wrong["loc"][0])
        return invalid(shown(name), _unknown(name, model.model_fields, what), message)
    return invalid(_field(wrong), _reason(wrong), message)


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first field's error; where a field may be of several types, the one about the type that was sent."""
    name = errors[0]["loc"][:1]
    same = [error for error in errors if error["loc"][:1] == name]
    if len(same) == 1:
        return same[0]
    telling = [error for error in same if error["type"] not in _WRONG_TYPE or len(error["loc"]) > 2]
    if telling:
        return telling[0]
    return {**same[0], "type": "string_or_list"}


def _field(wrong: ErrorDetails) -> str:
    """`command`, or `command[2]` for an item of a list."""
    name, *rest = wrong["loc"]
    return shown(str(name)) + "".join(f"[{part}]" for part in rest if isinstance(part, int))


def _reason(wrong: ErrorDetails) -> str:
    kind = wrong["type"]
    context = _context(wrong)
    if kind in _TYPES:
        return _TYPES[kind]
    match kind:
        case "string_or_list":
            return "must be a string or a list of strings"
        case "greater_than_equal" if context["ge"] > 0 >= wrong["input"]:
            return "must be greater than 0"
        case "greater_than_equal":
            return f"must be at least {context['ge']:.15g}"
        case "less_than_equal":
            return f"must be at most {context['le']:.16g}"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long" | "too_long":
            unit = "characters" if kind == "string_too_long" else "items"
            return f"must have at most {context['max_length']} {unit}"
        case "string_pattern_mismatch":
            return _PATTERNS[context["pattern"]]
        case "enum" | "literal_error":
            return f"must be one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
        case _:
            return wrong["msg"]


def _context(wrong: ErrorDetails) -> Mapping[str, Any]:
    return wrong.get("ctx", {})


def _unknown(name: str, known: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f"is not a known {what}; did you mean {near[0]}?" if near else f"is not a known {what}"


def shown(name: str) -> str:
    """A name that the client made up, short enough to send back."""
    return name if len(name) <= 100 else name[:100] + "…"
