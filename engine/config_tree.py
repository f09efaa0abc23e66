"""A config as nested mappings: settings put into it, and its faults, each as one sentence."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from unteach.engine.errors import InputError, reason


def put(tree: dict[str, Any], name: str, value: Any, names: Collection[str]) -> None:
    """Set the key of that dotted name in place.

    Args:
        names: every `section.key` there is.
    Raises:
        InputError: there is no such key.
    """
    section, *rest = name.split(".")
    if not rest and section == "target" and value is None:
        tree["target"] = None
        return
    if not rest and section in tree:
        null = f", or {section}=null for none" if section == "target" else ""
        raise InputError(f"{section} is a section of config keys: write {section}.key=value{null}.")
    if f"{section}.{rest[0] if rest else ''}" not in names:
        raise InputError(unknown_key(name, names))
    node = tree[section]
    if node is None:
        node = tree[section] = {}
    for part in rest[:-1]:
        if not isinstance(node.get(part), dict):
            raise InputError(unknown_key(name, names))
        node = node[part]
    node[rest[-1]] = value


def unknown_key(name: str, names: Collection[str]) -> str:
    """That there is no such key, and the nearest of those there are."""
    last = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or [
        full for full in names if difflib.get_close_matches(last, [full.split(".")[1]], cutoff=0.75)
    ]
    hint = f"; did you mean {near[0]}?" if near else "; `unteach recipes RECIPE` lists every key."
    return f"There is no config key {name}{hint}"


def bad_value(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """The first fault that a config has.

    Args:
        fields: every `section.key` there is.
    """
    faults = error.errors()
    first, loc = faults[0], [str(part) for part in faults[0]["loc"] if part != "[key]"]
    field = fields.get(".".join(loc[:2]))
    if first["type"] == "extra_forbidden":
        return unknown_key(".".join(loc), fields)
    given, message = first.get("input"), first["msg"].removeprefix("Value error, ")
    if field and len(loc) > 2 and get_origin(field.annotation) in (Union, UnionType):
        alike = [fault["msg"] for fault in faults if fault["loc"][:2] == first["loc"][:2]]
        message = ", or ".join([alike[0], *(m.removeprefix("Input should be ") for m in alike[1:])])
        loc = loc[:2]
    hint = ""
    if field and first["type"] in ("tuple_type", "missing", "too_long"):
        hint, loc = f": write {_list_like(field, given)}", loc[:2]
    return f"Config key {'.'.join(loc)}: {message}, not {given!r}{hint}."


def _list_like(field: FieldInfo, given: Any) -> str:
    """What was given as a list; the default makes up for what a fixed length lacks."""
    items = [*given] if isinstance(given, list | tuple) else [given]
    if Ellipsis not in get_args(field.annotation):
        items = [*items, *field.default[len(items) :]][: len(field.default)]
    return json.dumps(items, default=str)


def wanted_texts(error: ValidationError) -> set[str]:
    """Keys that hold something else where the config wants a text."""
    faults = (fault for fault in error.errors() if fault["type"] == "string_type")
    return {".".join(map(str, fault["loc"])) for fault in faults}


def unreadable(path: Path, error: OSError | UnicodeDecodeError | yaml.YAMLError) -> str:
    """Why a file is no config, with the line where YAML knows it."""
    where, why = str(path), reason(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"{path}, line {error.problem_mark.line + 1},"
        why = error.problem or "no YAML"
    return f"{where} cannot be read as a config: {why}."
