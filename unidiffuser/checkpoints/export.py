"""A checkpoint written back in the original layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..media.files import atomic_write
from .checkpoint import Checkpoint

_MASKED = -1e4  # what GPT-2's attention put in masked places when the published decoder was trained


def export_original(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> list[Path]:
    """Write uvit_v1.pth (v0 without data types), autoencoder_kl.pth and caption_decoder.pth, of the parts that are there.

    Bit by bit what `convert` read from such files: names get their "module." back, GPT-2 its tied output matrix, and each
    attention the causal mask that the reference's transformers 4.23 insists on. CLIP was never part of the set.

    Returns:
        The paths written.
    """
    version = "v1" if checkpoint.config.uvit.data_types else "v0"
    names = {"uvit": f"uvit_{version}.pth", "vae": "autoencoder_kl.pth", "caption": "caption_decoder.pth"}
    paths = []
    for part, name in names.items():
        if part not in checkpoint.parts():
            continue
        tensors = checkpoint.state_dict(part)
        if part == "caption":
            tensors = _with_masks(tensors, checkpoint.config.caption.gpt2["n_layer"])
        path = Path(folder) / name
        with atomic_write(path) as file:
            torch.save(tensors, file)
        paths.append(path)
    return paths


def _with_masks(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    positions = tensors["gpt.transformer.wpe.weight"].shape[0]
    mask = torch.ones(positions, positions, dtype=torch.uint8).tril()[None, None]
    tensors = {"gpt.lm_head.weight": tensors["gpt.transformer.wte.weight"], **tensors}
    for i in range(layers):
        tensors[f"gpt.transformer.h.{i}.attn.bias"] = mask
        tensors[f"gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(_MASKED)
    return {f"module.{name}": tensor for name, tensor in tensors.items()}
