"""Flags of the server commands, made from the one `Settings`: a setting needs no second mention here."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import click

from cloudai.settings import Settings, SettingsError, flag, load, parts, variable

Function = Callable[..., Any]
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}
_NAMED_METAVARS = {
    "database_url": "URL",
    "server": "URL",
    "host": "ADDRESS",
    "cpu": "CORES",
    "memory": "GIB",
    "storage": "GIB",
}


def setting_flags(*wanted: str, without: frozenset[str] = frozenset()) -> Callable[[Function], Function]:
    """Give a command the flags of every setting of the parts `wanted` (or named in it), but those in `without`."""

    def decorate(command: Function) -> Function:
        names = [name for name in Settings.model_fields if (parts(name) | {name}) & set(wanted) and name not in without]
        for name in reversed(names):
            command = _option(name)(command)
        return command

    return decorate


def settings_from(flags: dict[str, Any]) -> Settings:
    """Settings from flags and environment; what is wrong with them is an error of usage."""
    try:
        return load(flags)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None


def _option(name: str) -> Callable[[Function], Function]:
    field = Settings.model_fields[name]
    shown = f"{field.description}  [{variable(name)}{default_text(name)}]"
    kinds = list(_kinds(field.annotation))
    if bool in kinds:
        return click.option(f"{flag(name)}/--no-{flag(name)[2:]}", name, default=None, help=shown)
    choices = [kind for kind in kinds if isinstance(kind, str)]
    if choices:
        return click.option(flag(name), name, type=click.Choice(choices), help=shown)
    metavar = _NAMED_METAVARS.get(name) or _METAVARS.get(kinds[0], "PATH")
    return click.option(flag(name), name, metavar=metavar, help=shown)


def default_text(name: str) -> str:
    """`; default X`, or nothing where the description says what happens without a value."""
    default = Settings.model_fields[name].default
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        return f"; default {str(default).lower()}"
    return f"; default {default:g}" if isinstance(default, float) and default < 1e6 else f"; default {_plain(default)}"


def value_words(name: str) -> str:
    """`One of: a, b.`, or nothing where a setting takes any value of its kind."""
    choices = [kind for kind in _kinds(Settings.model_fields[name].annotation) if isinstance(kind, str)]
    return f"One of: {', '.join(choices)}." if choices else ""


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types a setting may have, without None; for a Literal, its words."""
    if isinstance(annotation, types.UnionType):
        for part in get_args(annotation):
            if part is not types.NoneType:
                yield from _kinds(part)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield annotation
