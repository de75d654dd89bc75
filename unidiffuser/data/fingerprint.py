"""Which encoders made a folder of latent shards, and whether a checkpoint has the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..media.json_files import brief
from .shards import LatentShards

PARTS = ("vae", "clip_image", "clip_text", "caption")
BYTES = 4096  # of each tensor that count


def fingerprint(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> str:
    """Digest of the weights that latents depend on.

    Args:
        checkpoint: with all of `PARTS`.
        dtype: number format to compute it in; None takes the weights as they are stored.

    Raises:
        FileNotFoundError: a part is absent.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        for name, tensor in sorted(checkpoint.state_dict(part).items()):
            if part != "caption" or name.startswith("encode_prefix."):
                digest.update(name.encode())
                digest.update(_first_bytes(tensor, dtype))
    return digest.hexdigest()[:16]


def _first_bytes(tensor: Tensor, dtype: torch.dtype | None) -> bytes:
    values = tensor.detach().flatten()[:BYTES]
    if dtype is not None and values.is_floating_point():
        values = values.to(dtype)
    return values.contiguous().view(torch.uint8).numpy().tobytes()[:BYTES]


def check_encoders(shards: LatentShards, checkpoint: Checkpoint) -> None:
    """Refuse shards that other encoders than a checkpoint's made: the same numbers mean other pictures and captions there.

    Encoders of half precision that were since saved in float32, as training does, are the same ones. A checkpoint without
    encoders, and shards that do not say, pass.

    Raises:
        ValueError: other encoders; names the folder and the checkpoint.
    """
    made = shards.manifest.get("encoding")
    wanted = made.get("encoders") if isinstance(made, dict) else None
    if wanted is None or not set(PARTS) <= set(checkpoint.parts()):
        return
    if not any(fingerprint(checkpoint, dtype) == wanted for dtype in (None, torch.float16, torch.bfloat16)):
        raise ValueError(
            f"the shards in {shards.folder} were made by other encoders (fingerprint {brief(wanted)}) than those of "
            f"{checkpoint.path} ({fingerprint(checkpoint)}), so their latents mean something else; encode the pictures with "
            "this model, or name the one that encoded them"
        )
