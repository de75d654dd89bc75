"""LoRA files: reading, writing, and applying them to a loaded model, reversibly.

A LoRA (Hu et al., arXiv 2106.09685) adds `strength * up @ down`, two low-rank matrices, to the weight of a layer. A file of
this project holds those of the network under the names that ComfyUI's own loader expects for its MODEL, and those of the
caption decoder, if it is adapted too, beside them:

    diffusion_model.<layer>.lora_A.weight (rank, in)     diffusion_model.<layer>.lora_B.weight (out, rank)
    caption_decoder.<layer>.lora_A.weight                caption_decoder.<layer>.lora_B.weight

Files of other trainers are read too if they use the U-ViT's layer names, in PEFT's or kohya's notation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.weights import WeightFiles, write_safetensors
from ..media.json_files import parse_object

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "uvit": ("diffusion_model.", "unet.base_model.model.", "base_model.model.", "unet.", ""),
    "caption": ("caption_decoder.",),
}
"""Prefixes of layer names in files, by the part of the checkpoint; files are written with the first."""
LORA_PARTS = tuple(PREFIXES)
"""The parts of a checkpoint that a LoRA can change."""
_KOHYA = "lora_unet_"
_DOWN, _UP = (".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")
_TITLES = {"uvit": "diffusion network", "caption": "caption decoder"}
METADATA = "unidiffuser_lora"


@dataclass(frozen=True)
class Change:
    """The change of one layer at strength 1: `scale * up @ down`; down (rank, in), up (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def delta(self, layer: str, shape: Sequence[int]) -> Tensor:
        """The summand of the weight of `layer`, in its `shape`, float32."""
        product = self.scale * (self.up.float() @ self.down.float())
        return (product.T if _is_transposed(layer) else product).reshape(*shape)  # a convolution kernel is a matrix, flattened


@dataclass(frozen=True)
class LoRA:
    """A file's changes by part ("uvit", "caption") and layer, and its metadata in `about`."""

    name: str
    changes: Mapping[str, Mapping[str, Change]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> tuple[str, ...] | None:
        """The words of its training captions, none of a distilled one; None if the file does not list them."""
        if "distilled" in self.about:
            return ()
        captions = self.about.get("words")
        if not isinstance(captions, list):
            return None
        return tuple(dict.fromkeys(word for caption in captions for word in str(caption).replace(",", " ").split()))


def lora_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a LoRA file; empty if it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file.
    """
    return _about(path, WeightFiles(Path(path)))


def layers_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The layers of a part that a LoRA may change, from its state dict: name and shape of the weight.

    `encode_prefix` is excluded: it makes the text latents that the network was trained on.
    """
    names = (key.removesuffix(".weight") for key, weight in weights.items() if key.endswith(".weight") and weight.ndim > 1)
    return {name: tuple(weights[f"{name}.weight"].shape) for name in names if name != "encode_prefix"}


def read_lora(path: str | os.PathLike[str], layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> LoRA:
    """Read a LoRA file for a model.

    Args:
        path: a safetensors file, or one written by torch.save.
        layers: for each part ("uvit", "caption") of the model, the result of `layers_of`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, no LoRA, or one for another network or another size of it.
    """
    source = WeightFiles(Path(path))
    tensors = source.open()
    pairs = _pairs(tensors)
    if not pairs:
        raise ValueError(
            f"{path} is not a LoRA: none of its {len(tensors)} tensors is a pair lora_A and lora_B (or lora_down and lora_up)."
        )
    notations = _notations(layers)
    unknown = [name for name in pairs if name not in notations]
    if unknown:
        hint = (
            "it is for diffusers' UniDiffuserModel, whose layers have other names"
            if any(".to_q" in name or "_to_q" in name for name in unknown)
            else "its layers are not this model's"
        )
        raise ValueError(
            f"{path} is a LoRA for another network: {len(unknown)} of its {len(pairs)} layers are unknown here, as "
            f"{unknown[0]}; {hint}. Train one with `unidiffuser train-lora`, or choose another file."
        )
    changes: dict[str, dict[str, Change]] = {}
    for name, (down, up) in pairs.items():
        part, layer = notations[name]
        _check_matrices(path, name, down, up)
        down, up = down.flatten(1), up.flatten(1)
        rank, shape = down.shape[0], layers[part][layer]
        if up.shape[1] != rank:
            raise ValueError(f"{path} is damaged: the two matrices of {name} have ranks {rank} and {up.shape[1]}.")
        given, needed = (up.shape[0], down.shape[1]), (shape[0], math.prod(shape[1:]))
        if given != (needed[::-1] if _is_transposed(layer) else needed):
            raise ValueError(
                f"{path} is a LoRA for a model of another size: it changes {layer} of the {_TITLES[part]} as {given[0]} x "
                f"{given[1]}, but here that layer is {needed[0]} x {needed[1]}. Use it with the model that it was trained on."
            )
        alpha = tensors.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else _alpha(path, name, alpha) / rank
        changes.setdefault(part, {})[layer] = Change(down.clone(), up.clone(), scale)
    return LoRA(str(path), changes, _about(path, source))


def _about(path: str | os.PathLike[str], source: WeightFiles) -> dict[str, Any]:
    text = source.metadata().get(METADATA)
    return parse_object(text, f"{path} is damaged: its entry {METADATA}", "train or download it again.") if text else {}


def _check_matrices(path: str | os.PathLike[str], name: str, down: Tensor, up: Tensor) -> None:
    for matrix in (down, up):
        if matrix.ndim < 2 or 0 in matrix.shape or not matrix.is_floating_point():
            raise ValueError(
                f"{path} is damaged: a matrix of {name} has shape {tuple(matrix.shape)} and type {matrix.dtype}; it must hold "
                f"floating-point numbers in rows and columns."
            )
        if not matrix.float().isfinite().all():
            raise ValueError(f"{path} is damaged: a matrix of {name} holds NaN or infinity.")


def _alpha(path: str | os.PathLike[str], name: str, alpha: Tensor) -> float:
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(value := float(alpha)):
        raise ValueError(f"{path} is damaged: the alpha of {name} must be one finite number.")
    return value


def write_lora(
    path: str | os.PathLike[str],
    changes: Mapping[str, Mapping[str, Change]],
    about: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the file, complete or not at all; scales are multiplied into `lora_B`.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for part, layers in changes.items():
        for layer, change in layers.items():
            name = PREFIXES[part][0] + layer
            tensors[name + _DOWN[0]] = change.down.to(dtype)
            tensors[name + _UP[0]] = (change.up.float() * change.scale).to(dtype)
    write_safetensors(Path(path), tensors, tensors.items, {METADATA: json.dumps(dict(about), ensure_ascii=False)})


def apply_loras(module: nn.Module, part: str, loras: Sequence[tuple[LoRA, float]], originals: Mapping[str, Tensor]) -> None:
    """Set the weights of `module` to the original ones plus those of the LoRAs, each times its strength.

    Args:
        module: the part, changed in place.
        part: "uvit" or "caption".
        loras: all that shall be applied; an empty list removes every one.
        originals: the original weights by their names in the part's state dict, at least of all layers that these LoRAs, or
            those applied before, change. Sums start from them, so nothing of earlier LoRAs remains.
    """
    with torch.inference_mode(False), torch.no_grad():
        for key, original in originals.items():
            layer = key.removesuffix(".weight")
            weight = module.get_parameter(key)
            total = original.to(weight.device)
            for lora, strength in loras:
                change = lora.changes.get(part, {}).get(layer)
                if change is not None:
                    total = total.float() + strength * change.delta(layer, weight.shape).to(weight.device)
            weight.data = total.to(weight.dtype, copy=True)


def _is_transposed(layer: str) -> bool:
    """Whether a layer stores its weight as (in, out), as those of GPT-2 do."""
    return layer.endswith((".c_attn", ".c_proj", ".c_fc"))


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by their common name; incomplete pairs are left out."""
    pairs = {}
    for down_end, up_end in zip(_DOWN, _UP, strict=True):
        for key in tensors:
            name = key.removesuffix(down_end)
            if name != key and name + up_end in tensors:
                pairs[name] = (tensors[key], tensors[name + up_end])
    return pairs


def _notations(layers: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, str]]:
    """(part, layer) by every notation of the layer's name."""
    notations: dict[str, tuple[str, str]] = {}
    for part, names in layers.items():
        for name in names:
            notations |= {prefix + name: (part, name) for prefix in PREFIXES[part]}
            if part == "uvit":
                notations[_KOHYA + name.replace(".", "_")] = (part, name)
    return notations
