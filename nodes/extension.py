"""What the pack brings to the host."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import captions, folders, loader, path


class UniDiffuserExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loader.NODES, *path.NODES, *captions.NODES]
