"""JSON from files and headers, with every mistake as a ValueError of one line."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def brief(value: object) -> str:
    """`repr` of a value from outside for messages: at most a line, also of long texts and deep lists."""
    return _brief.repr(value)


def shown_list(names: Iterable[object], most: int = 5) -> str:
    """Names from outside for messages, the first `most` of them, each at most 60 characters long."""
    found = [" ".join(str(name)[:60].split()) for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def parse_json(text: str | bytes, name: str, remedy: str = "download it again.") -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        name: subject of the message.
        remedy: end of the message: what to do.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON (nested too deeply); {remedy}") from None
    except ValueError as error:
        reason = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{name} is not valid JSON ({reason}); {remedy}") from error


def parse_object(text: str | bytes, name: str, remedy: str = "download it again.") -> dict[str, Any]:
    """The JSON object of a text; arguments and errors as for `parse_json`."""
    value = parse_json(text, name, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no JSON object; {remedy}")
    return value


def read_object(path: Path, remedy: str = "download it again.") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none; names the file.
    """
    return parse_object(path.read_bytes(), str(path), remedy)
