"""Names of LoRA files that the host cannot match to a U-ViT: those of diffusers' UniDiffuserModel, and PEFT's own.

The host matches the names of its own parameters, dotted or in kohya's style. This module adds an entry to its list of adapter
classes that looks up the adapter of a parameter under other names. diffusers splits qkv into three layers; their LoRAs
concatenate to one LoRA of three times the rank.
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
    """Finds the adapter of a U-ViT parameter under other names; returns an adapter class of the host."""

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
        """The adapter of the host's parameter `x` (without ".weight"), or None; adds the keys used to `loaded_keys`."""
        name = x.removeprefix(HOST_PREFIX)
        if name == x or not (BLOCK.fullmatch(name) or (OUTSIDE_BLOCKS.fullmatch(name) and _is_of_uvit(lora))):
            return None
        names = [other.removesuffix(".weight") for other in uvit_diffusers_names(f"{name}.weight")]
        used: set[str] = set()
        adapter = _find(name, lora, used, excluded=x) or (
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
    """The names under which trainers store a module."""
    processor = name.replace(".to_", ".processor.to_").removesuffix(".0")  # diffusers, before it adopted PEFT
    flat = name.replace(".", "_")
    return [f"{prefix}{n}" for n in dict.fromkeys((name, processor)) for prefix in PREFIXES] + [
        f"lora_unet_{flat}",
        f"lycoris_{flat}",
    ]


def _find(name: str, lora: dict[str, Tensor], used: set[str], excluded: str | None = None) -> WeightAdapterBase | None:
    """The adapter of a module under any spelling of its name except `excluded`; adds its keys to `used`."""
    for spelling in _spellings(name):
        extras = {key: lora.get(f"{spelling}.{key}") for key in ("alpha", "dora_scale")}
        alpha = None if extras["alpha"] is None else extras["alpha"].item()
        for adapter_class in comfy.weight_adapter.adapters:
            if adapter_class is OtherNames or spelling == excluded:
                continue
            adapter = adapter_class.load(spelling, lora, alpha, extras["dora_scale"], used)
            if adapter is not None:
                used |= {f"{spelling}.{key}" for key, value in extras.items() if value is not None}
                return adapter
    return None


def _side_by_side(parts: list[WeightAdapterBase | None]) -> LoRAAdapter | None:
    """One LoRA of qkv from those of q, k and v, some of which may be missing; None if they cannot be joined."""
    there = [part for part in parts if part is not None]
    if not there or any(not isinstance(part, LoRAAdapter) or any(w is not None for w in part.weights[3:]) for part in there):
        return None  # NOTE: the host then reports the keys as not loaded
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
    """Add `OtherNames` to the host's adapter classes."""
    if OtherNames not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(OtherNames)
