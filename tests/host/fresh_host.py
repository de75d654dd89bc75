"""A fresh ComfyUI with this pack for the scripts: an empty base directory, the bundled model, no input pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host_server import HostServer
from tiny_server import HOW, find_comfyui


@contextmanager
def fresh_host(*arguments: str) -> Iterator[HostServer]:
    """A running server of the ComfyUI of COMFYUI_PATH and COMFYUI_PYTHON, else of ~/comfy, with some of its options."""
    found = find_comfyui()
    if found is None:
        raise SystemExit(HOW)
    with tempfile.TemporaryDirectory() as folder:
        server = HostServer(*found, Path(folder), *arguments)
        try:
            yield server
        finally:
            server.stop()


def version(server: HostServer) -> str:
    """Such as "0.33.0"."""
    return str(server.get("/system_stats")["system"]["comfyui_version"])


def forget(server: HostServer) -> None:
    """Empty the caches, so that the next prompt runs every node."""
    server.request("/free", {"unload_models": True, "free_memory": True})
    # NOTE: the server frees memory after a prompt, so a trivial one is run.
    empty = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    server.run({"1": empty, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
