"""LoRA files whose names the host cannot match to a U-ViT: those trained on diffusers' UniDiffuserModel, and PEFT's own.

The host knows the names of its own parameters, dotted and in kohya's way. Other names come to it here, as one more entry of
its list of adapter kinds: asked for the adapter of a parameter, this one looks under the parameter's other names. diffusers
splits qkv in three, and three LoRAs side by side are one of three times the rank.
"""

from __future__ import annotations

import re

import comfy.weight_adapter
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..unidiffuser.checkpoints.keys import uvit_diffusers_names

HOST_PREFIX = "diffusion_model."
PREFIXES = ("", "unet.", "base_model.model.", "unet.base_model.model.", "diffusion_model.")
BLOCK = re.compile(r"((in|out)_blocks\.\d+|mid_block)\.(attn\.(qkv|proj)|mlp\.fc[12]|skip_linear)")
OUTSIDE_BLOCKS = re.compile(r"patch_embed\.proj|(text|clip_img)_(embed|out)|decoder_pred")


class OtherNames(WeightAdapterBase):
    """Finds the adapter of a U-ViT's parameter under names that are not the host's; the adapter is one of the host's."""

    name = "unidiffuser_other_names"

    @classmethod
    def load(
        cls,
        x: str,
        lora: dict[str, Tensor],
        alpha: float | None,
        dora_scale: Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:
        """The adapter of the host's parameter `x` (without ".weight"), or None; what it is made of joins `loaded_keys`."""
        name = x.removeprefix(HOST_PREFIX)
        if name == x or not (BLOCK.fullmatch(name) or (OUTSIDE_BLOCKS.fullmatch(name) and _is_of_uvit(lora))):
            return None
        names = [other.removesuffix(".weight") for other in uvit_diffusers_names(f"{name}.weight")]
        used: set[str] = set()
        adapter = _find(name, lora, used, besides=x) or (
            _find(names[0], lora, used) if len(names) == 1 else _side_by_side([_find(n, lora, used) for n in names])
        )
        if adapter is not None:
            adapter.loaded_keys = used
            if loaded_keys is not None:
                loaded_keys |= used
        return adapter


def _is_of_uvit(lora: dict[str, Tensor]) -> bool:
    return any("in_blocks" in key for key in lora)


def _spellings(name: str) -> list[str]:
    """All the ways in which trainers write the name of a module."""
    processor = name.replace(".to_", ".processor.to_").removesuffix(".0")  # diffusers before it used PEFT
    flat = name.replace(".", "_")
    return [f"{prefix}{n}" for n in dict.fromkeys((name, processor)) for prefix in PREFIXES] + [
        f"lora_unet_{flat}",
        f"lycoris_{flat}",
    ]


def _find(name: str, lora: dict[str, Tensor], used: set[str], besides: str | None = None) -> WeightAdapterBase | None:
    """The adapter of a module under any spelling of its name but `besides`; its keys join `used`."""
    for spelling in _spellings(name):
        told = {key: lora.get(f"{spelling}.{key}") for key in ("alpha", "dora_scale")}
        alpha = None if told["alpha"] is None else told["alpha"].item()
        for kind in comfy.weight_adapter.adapters:
            if kind is OtherNames or spelling == besides:
                continue
            adapter = kind.load(spelling, lora, alpha, told["dora_scale"], used)
            if adapter is not None:
                used |= {f"{spelling}.{key}" for key, value in told.items() if value is not None}
                return adapter
    return None


def _side_by_side(parts: list[WeightAdapterBase | None]) -> LoRAAdapter | None:
    """One LoRA of a qkv from those of its q, k and v, of which some may be missing; None if that cannot be said as one."""
    there = [part for part in parts if part is not None]
    if not there or any(not isinstance(part, LoRAAdapter) or any(w is not None for w in part.weights[3:]) for part in there):
        return None  # NOTE: the host then says that these keys were not loaded
    rows = there[0].weights[0].shape[0]
    ranks = [0 if part is None else part.weights[1].shape[0] for part in parts]
    down = torch.cat([part.weights[1] for part in there])  # (ranks together, D)
    up = torch.zeros(rows * len(parts), sum(ranks), dtype=torch.float32)  # (3 D, ranks together)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            factor = 1.0 if part.weights[2] is None else part.weights[2] / ranks[i]
            up[i * rows : (i + 1) * rows, column : column + ranks[i]] = part.weights[0].float() * factor
            column += ranks[i]
    return LoRAAdapter(set(), (up, down, None, None, None, None))


def register() -> None:
    """Tell the host's LoRA loader."""
    if OtherNames not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(OtherNames)
