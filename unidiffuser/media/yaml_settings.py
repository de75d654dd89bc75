"""Settings from YAML files, with values of the types that a dataclass declares."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .json_files import brief

DEEPEST = 100  # brackets within brackets


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        what: what it holds, for messages: "training" settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML in UTF-8, or no mapping; one line that names the place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} config at {path}")
    try:
        values = parse(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} is not a YAML mapping of {what} settings")
    return values


def parse(text: str, name: str) -> Any:
    """The value of a YAML text; ValueError that names the place of a mistake in one line."""
    import yaml

    depth = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
    if max(depth, default=0) > DEEPEST:  # PyYAML takes minutes for a hundred thousand brackets
        raise ValueError(f"{name} is not YAML of settings: it is nested too deeply")
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors raise almost anything, as for an impossible date
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        lines = str(getattr(error, "problem", None) or error).splitlines() or [type(error).__name__]
        raise ValueError(f"{name}{place} is not YAML: {lines[0][:200]}") from None


def typed(kind: type, values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of a dataclass's fields, each of the declared type; others are left out of the check.

    A whole number counts as a float, and so does a text such as "2e-4", which YAML 1.1 takes for a text.

    Raises:
        ValueError: a value of another type; begins with `name` and names the field.
    """
    return typed_values(get_type_hints(kind), values, name)


def typed_values(kinds: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Like `typed`, with the type of each value by its name."""
    return {key: _value(value, kinds[key], f"{name}: {key}") if key in kinds else value for key, value in values.items()}


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping", list: "a list"}


def _value(value: Any, hint: Any, name: str) -> Any:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _of_union(value, inner, name)
    if kind is Any or kind not in (*_NAMES, tuple):
        return value
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            raise ValueError(f"{name} must be {len(inner)} values in brackets, as in [0.9, 0.95], got {brief(value)}")
        return tuple(float(_value(item, each, name)) for item, each in zip(value, inner, strict=True))
    if kind is dict and inner and isinstance(value, dict):
        return {str(key): _value(each, inner[1], f"{name}.{key}") for key, each in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value  # as it is written: folders of evaluations are named after their settings
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is list and isinstance(value, Sequence) and not isinstance(value, str):
        return [_value(item, inner[0], name) for item in value] if inner else list(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_NAMES[kind]}, got {'null' if value is None else brief(value)}")


def _of_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in (kind for kind in kinds if kind is not type(None)):
        try:
            return _value(value, kind, name)
        except ValueError as error:
            errors.append(error)
    raise errors[0]
