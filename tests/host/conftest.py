"""Host tests run in a real ComfyUI, where there is one: see `tiny_server.find_comfyui`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host_server import HostServer
from tiny_server import HOW, find_comfyui, tiny_server


@pytest.fixture(scope="session")
def host() -> tuple[Path, Path]:
    """(folder, interpreter) of the ComfyUI to test in."""
    found = find_comfyui()
    if found is None:
        pytest.skip(HOW)
    return found


@pytest.fixture(scope="session")
def server(host: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """One ComfyUI for all tests, with the tiny checkpoint in models/unidiffuser."""
    with tiny_server(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_file(server: HostServer) -> Path:
    """The tiny checkpoint of that server."""
    return server.base / "models/unidiffuser/tiny.safetensors"
