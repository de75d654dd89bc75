"""Host tests run against a real ComfyUI, where there is one: COMFYUI_PATH and COMFYUI_PYTHON, or ~/comfy."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_server import HostServer


def comfyui() -> tuple[Path, Path] | None:
    """(folder, interpreter) of the ComfyUI to test in."""
    home = Path.home() / "comfy"
    folder = Path(os.environ.get("COMFYUI_PATH", home / "ComfyUI"))
    python = Path(os.environ.get("COMFYUI_PYTHON", home / "venv/bin/python"))
    return (folder, python) if (folder / "main.py").is_file() and python.is_file() else None


