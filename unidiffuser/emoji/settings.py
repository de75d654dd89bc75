"""Settings from YAML, as dataclasses whose fields are checked by their annotations."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Limits = tuple[float | None, float | None]
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def within(least: float | None = None, most: float | None = None, **arguments: Any) -> Any:
    """A dataclass field whose number, or each of its numbers, lies in [least, most]; `arguments` as for `field`."""
    return field(metadata={"limits": (least, most)}, **arguments)


def read_settings(kind: type[T], values: Any, name: str) -> T:
    """An instance of a dataclass from plain values.

    Args:
        kind: the dataclass. Fields may be numbers, text, booleans, `Literal`, optional, tuples, dicts and other dataclasses.
        values: a mapping, as YAML gives it.
        name: begins the text of an error, as in "recipe.yaml: network".

    Raises:
        ValueError: an unknown or missing setting, a value of a wrong type or outside its limits; one line that names it.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # any dataclass
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping with {', '.join(known)}, not {values!r}")
    for key in values:
        if key not in known:
            close = get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it may have {', '.join(known)}"
            raise ValueError(f"{name} has no setting {key!r}; {hint}")
    needed = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"{name} lacks {' and '.join(missing)}; add it, see the comments in {kind.__module__}")
    hints = get_type_hints(kind)
    return kind(
        **{
            key: _checked(hints[key], value, f"{name}.{key}", known[key].metadata.get("limits", (None, None)))
            for key, value in values.items()
        }
    )


def _checked(hint: Any, value: Any, name: str, limits: Limits) -> Any:
    """A value of the annotated type, or a ValueError that says what the type is."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return read_settings(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, name, limits)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {', '.join(map(str, inner))}, not {value!r}")
        return value
    if origin is tuple:
        length = None if inner[-1] is Ellipsis else len(inner)
        if not isinstance(value, list | tuple) or length not in (None, len(value)) or not value:
            raise ValueError(f"{name} must be a list{f' of {length}' if length else ''}, not {value!r}")
        kinds = inner[:1] * len(value) if length is None else inner
        return tuple(_checked(kinds[i], x, f"{name}[{i}]", limits) for i, x in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a mapping, not {value!r}")
        return {
            _checked(inner[0], k, name, (None, None)): _checked(inner[1], x, f"{name}.{k}", limits) for k, x in value.items()
        }
    return _scalar(hint, value, name, limits)


def _one_of(kinds: tuple[Any, ...], value: Any, name: str, limits: Limits) -> Any:
    """A value of one of several annotated types."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return _checked(others[0], value, name, limits)
    if type(value) not in others:
        raise ValueError(f"{name} must be {' or '.join(NAMES[kind] for kind in others)}, not {value!r}")
    return value


def _scalar(kind: Any, value: Any, name: str, limits: Limits) -> Any:
    """A number, a text, true or false. YAML 1.1 reads 1e-3 as a text; it counts as a number here."""
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} must be {NAMES[kind]}, not {value!r}")
    least, most = limits if kind in (int, float) else (None, None)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least:g}, not {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:g}, not {value!r}")
    return value
