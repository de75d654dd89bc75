"""What the pack brings to the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import caption_lora, captions, examples, folders, gibbs, invert, loader, lora, path, sampler, score, train, words


class UniDiffuserExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()
        lora.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = (loader, path, sampler, captions, words, invert, gibbs, score, examples, caption_lora, train)
        return [node for module in modules for node in module.NODES]
