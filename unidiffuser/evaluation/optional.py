"""Packages of the extra `evaluate`, imported when first used."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """Import a module; ValueError with the pip command if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"this measure needs the package {package!r}, which cannot be imported ({error}): "
            'install it with `pip install "unidiffuser[evaluate]"`, or take the measure out of the config'
        ) from error
