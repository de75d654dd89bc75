"""Load UniDiffuser LoRA: a LoRA on the network, by the host, and on the caption decoder, which the host does not know."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..unidiffuser.runtime.lora import PREFIXES, layers_of, read_lora
from .host_parts import HostCaptionDecoder
from .stream_inputs import require_model
from .types import CATEGORY, CaptionDecoderType

OF_CAPTIONS = PREFIXES["caption"]


def on_model(model: Any, path: str, strength: float) -> Any:
    """The MODEL with a file's changes of the network, put on by the host."""
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_CAPTIONS)}
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def on_captions(decoder: HostCaptionDecoder, path: str, strength: float) -> HostCaptionDecoder:
    """The caption decoder with a file's changes of it; the same one where the file has none.

    Raises:
        ValueError: the file is no LoRA, or one for another model.
    """
    parts = {part: layers_of(decoder.checkpoint.state_dict(part)) for part in ("uvit", "caption")}
    changes = read_lora(path, parts).changes.get("caption", {})
    if not changes or strength == 0:
        return decoder
    shapes = parts["caption"]
    patches = {f"{layer}.weight": ("diff", (change.delta(layer, shapes[layer]),)) for layer, change in changes.items()}
    patcher = decoder.patcher.clone()  # of the same weights: the host puts the patches on and takes them off
    patcher.add_patches(patches, strength)
    changed = copy.copy(decoder)
    changed.patcher = patcher  # type: ignore[misc]  # in place of the cached one
    return changed


class LoadUniDiffuserLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, what: str) -> io.Float.Input:
            return io.Float.Input(name, default=1, min=-10, max=10, step=0.05, tooltip=f"How much it changes {what}; 0 is off.")

        return io.Schema(
            node_id="UniDiffuserLoraLoader",
            display_name="Load UniDiffuser LoRA",
            category=CATEGORY,
            description="Puts a LoRA on a UniDiffuser: its word calls the new picture and, with the caption decoder connected, "
            "its picture calls the new word. Without captions, the host's own Load LoRA does the same.",
            search_aliases=["lora", "lora loader", "teach", "concept"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser, or from another LoRA."),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser; it learns to write the word."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"), tooltip="A file of models/loras."),
                strength("strength_model", "the pictures"),
                strength("strength_captions", "the captions"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="With the LoRA on."),
                CaptionDecoderType.Output(display_name="CAPTION_DECODER", tooltip="With the LoRA on."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, caption_decoder: Any, lora_name: str, strength_model: float, strength_captions: float
    ) -> io.NodeOutput:
        require_model(model)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        changed = on_captions(caption_decoder, path, strength_captions)
        return io.NodeOutput(on_model(model, path, strength_model), changed)


NODES = [LoadUniDiffuserLora]
