"""UniDiffuser for ComfyUI: the entry point that the host looks for. The library itself is the `unidiffuser` package.

Nothing happens here at import: the nodes, and with them the host's modules, are imported when the host asks for them, so
this file can be imported without ComfyUI (pytest does, from the repository root).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """Called once by ComfyUI (V3 extensions)."""
    from .nodes.extension import UniDiffuserExtension

    return UniDiffuserExtension()
