"""A fresh ComfyUI with the tiny checkpoint in models/unidiffuser: for the host tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host_server import HostServer
from tiny import write_tiny_checkpoint

HOW = "NO COMFYUI: set COMFYUI_PATH and COMFYUI_PYTHON to a ComfyUI and to the python that has its requirements"


def find_comfyui() -> tuple[Path, Path] | None:
    """(folder, interpreter) of the ComfyUI to use: COMFYUI_PATH and COMFYUI_PYTHON, or ~/comfy; None if there is none."""
    home = Path.home() / "comfy"
    folder = Path(os.environ.get("COMFYUI_PATH", home / "ComfyUI"))
    python = Path(os.environ.get("COMFYUI_PYTHON", home / "venv/bin/python"))
    return (folder, python) if (folder / "main.py").is_file() and python.is_file() else None


@contextmanager
def tiny_server(base: Path, *arguments: str) -> Iterator[HostServer]:
    """A running server whose folders are below `base`, started with the host's own `arguments`.

    Raises:
        FileNotFoundError: there is no ComfyUI.
    """
    found = find_comfyui()
    if found is None:
        raise FileNotFoundError(HOW)
    for folder in ("models/unidiffuser", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    write_tiny_checkpoint(base / "models/unidiffuser/tiny.safetensors")
    shutil.copy(Path(__file__).with_name("misbehaving_nodes.py"), base / "custom_nodes")
    server = HostServer(*found, base, *arguments)
    try:
        yield server
    finally:
        server.stop()
