"""The extension that the host loads: its folders, its LoRA names and its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    folders,
    lora_names,
    nodes_captions,
    nodes_examples,
    nodes_gibbs,
    nodes_invert,
    nodes_jobs,
    nodes_loader,
    nodes_lora,
    nodes_pairs,
    nodes_path,
    nodes_prompt,
    nodes_sampler,
    nodes_score,
    nodes_train_lora,
    nodes_words,
)

TOPICS = (
    nodes_loader,
    nodes_jobs,
    nodes_prompt,
    nodes_path,
    nodes_sampler,
    nodes_captions,
    nodes_pairs,
    nodes_words,
    nodes_invert,
    nodes_gibbs,
    nodes_score,
    nodes_examples,
    nodes_lora,
    nodes_train_lora,
)


class UniDiffuserExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()
        lora_names.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for topic in TOPICS for node in topic.NODES]
