"""Host tests run in a real ComfyUI, where there is one: COMFYUI_PATH and COMFYUI_PYTHON, or ~/comfy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_server import HostServer
from tiny import write_tiny_checkpoint


def find_comfyui() -> tuple[Path, Path] | None:
    """(folder, interpreter) of the ComfyUI to test in."""
    home = Path.home() / "comfy"
    folder = Path(os.environ.get("COMFYUI_PATH", home / "ComfyUI"))
    python = Path(os.environ.get("COMFYUI_PYTHON", home / "venv/bin/python"))
    return (folder, python) if (folder / "main.py").is_file() and python.is_file() else None


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path) -> Iterator[HostServer]:
    """One ComfyUI for all tests, with the tiny checkpoint in models/unidiffuser."""
    found = find_comfyui()
    if found is None:
        pytest.skip("NO COMFYUI: set COMFYUI_PATH and COMFYUI_PYTHON to run the host tests")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models/unidiffuser").mkdir(parents=True)
    (base / "models/unidiffuser/tiny.safetensors").write_bytes(tiny_file.read_bytes())
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("misbehaving_nodes.py"), base / "custom_nodes")
    server = HostServer(*found, base)
    yield server
    server.stop()
