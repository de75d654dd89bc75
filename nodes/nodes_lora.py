"""Load UniDiffuser LoRA: a LoRA on the MODEL, which the host applies, and on the caption decoder, which it does not know."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..unidiffuser.runtime.lora import PREFIXES, layers_of, read_lora
from .host_captions import HostCaptionDecoder
from .stream_inputs import require_model
from .types import CATEGORY, CaptionDecoderType

OF_CAPTIONS = PREFIXES["caption"]


def on_model(model: Any, path: str, strength: float) -> Any:
    """The MODEL with the LoRA of a file, applied by the host."""
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_CAPTIONS)}
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def on_captions(decoder: HostCaptionDecoder, path: str, strength: float) -> HostCaptionDecoder:
    """The caption decoder with the LoRA of a file; unchanged if the file has none for it.

    Raises:
        ValueError: the file is not a LoRA, or its layers do not fit this model.
    """
    parts = {part: layers_of(decoder.checkpoint.state_dict(part)) for part in ("uvit", "caption")}
    changes = read_lora(path, parts).changes.get("caption", {})
    if not changes or strength == 0:
        return decoder
    shapes = parts["caption"]
    patches = {f"{layer}.weight": ("diff", (change.delta(layer, shapes[layer]),)) for layer, change in changes.items()}
    patcher = decoder.patcher.clone()  # shares the weights; the host applies and removes the patches
    patcher.add_patches(patches, strength)
    changed = copy.copy(decoder)
    changed.patcher = patcher  # type: ignore[misc]  # replaces the cached property
    return changed


class LoadUniDiffuserLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, what: str) -> io.Float.Input:
            tooltip = f"How strongly the LoRA changes the {what}. 1 is normal, 0 is off."
            return io.Float.Input(name, default=1, min=-10, max=10, step=0.05, tooltip=tooltip)

        return io.Schema(
            node_id="UniDiffuserLoraLoader",
            display_name="Load UniDiffuser LoRA",
            category=CATEGORY,
            description="Applies a LoRA to the MODEL, for images of its subject, and to the caption decoder, for captions that "
            "name it. For images alone, Load LoRA of ComfyUI does the same.",
            search_aliases=["lora", "lora loader", "concept", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser or another LoRA."),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser or another LoRA."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"), tooltip="A file in models/loras."),
                strength("strength_model", "images"),
                strength("strength_captions", "captions"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                CaptionDecoderType.Output(display_name="CAPTION_DECODER", tooltip="The caption decoder with the LoRA applied."),
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
