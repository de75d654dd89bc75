"""Export of a checkpoint to the original layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..media.files import atomic_write
from .checkpoint import Checkpoint

_MASKED = -1e4  # value of masked attention logits in the GPT-2 of the published decoder


def export_original(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> list[Path]:
    """Write a checkpoint in the original layout, bit for bit as `convert` read it.

    The files are uvit_v1.pth (or uvit_v0.pth), autoencoder_kl.pth and caption_decoder.pth, of the parts that are present; the
    published set has no CLIP. The caption decoder gets back its prefix "module.", the tied output matrix of GPT-2 and the
    causal masks that the reference's transformers 4.23 requires.

    Args:
        checkpoint: of any layout.
        folder: existing or not; files in it are replaced.

    Returns:
        The paths written.

    Raises:
        OSError: a file cannot be written.
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
