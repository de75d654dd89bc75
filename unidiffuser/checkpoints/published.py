"""The authors' checkpoints: where they are published, which files they consist of, and how to get them."""

from __future__ import annotations

import re
from collections.abc import Collection

from .layout_diffusers import FOLDERS

REPOSITORIES = {"v1": "thu-ml/unidiffuser-v1", "v0": "thu-ml/unidiffuser-v0"}
"""Repositories on huggingface.co; v1 was trained further than v0, on cleaner pairs."""
LICENCE = "AGPL-3.0"
HOW_TO_GET = (
    "For the published 1 B model run `unidiffuser download v1` (or v0). By hand, get from huggingface.co/"
    f"{REPOSITORIES['v1']} ({LICENCE}) into one folder either the diffusers layout: model_index.json; unet/, vae/ and "
    "text_decoder/, each with config.json and diffusion_pytorch_model.safetensors or .bin; text_encoder/ and image_encoder/, "
    "each with config.json and model.safetensors or pytorch_model.bin; clip_tokenizer/ and text_tokenizer/, each with "
    "vocab.json and merges.txt. Or the original layout: uvit_v1.pth, autoencoder_kl.pth, caption_decoder.pth, and the folders "
    "clip-vit-large-patch14/ and clip-vit-base-patch32/, each with config.json and model.safetensors of huggingface.co/openai."
)
_TOKENIZERS = ("clip_tokenizer", "text_tokenizer")


def needed_files(available: Collection[str]) -> list[str]:
    """Files of a diffusers repository that this library reads, the weights last.

    Of several formats of the same weights only the one that `layout_diffusers` prefers is named.

    Args:
        available: paths of the files in the repository, with "/".

    Raises:
        FileNotFoundError: the repository lacks files; names them all.
    """
    small, weights, missing = ["model_index.json"], [], []
    for sub, stem in FOLDERS.values():
        small.append(f"{sub}/config.json")
        found = _weights(available, sub, stem) or _weights(available, sub, "pytorch_model")
        weights += found
        missing += [] if found else [f"{sub}/{stem}.safetensors"]
    for sub in _TOKENIZERS:
        pair = [f"{sub}/vocab.json", f"{sub}/merges.txt"]
        small += [f"{sub}/tokenizer.json"] if f"{sub}/tokenizer.json" in available and pair[0] not in available else pair
        small += [name for name in (f"{sub}/added_tokens.json",) if name in available]
    small += sorted(name for name in available if re.fullmatch(r"\w+/preprocessor_config\.json", name))
    missing += [name for name in small + weights if name not in available]
    if missing:
        raise FileNotFoundError(f"it lacks {', '.join(missing)}")
    return small + weights


def _weights(available: Collection[str], sub: str, stem: str) -> list[str]:
    """The file, or index and shards, of a part's weights; [] if there are none."""
    for suffix in (".safetensors", ".bin"):
        name = f"{sub}/{stem}{suffix}"
        if name in available:
            return [name]
        index = f"{name}.index.json"
        if index in available:
            shard = re.compile(re.escape(f"{sub}/{stem}") + r"-\d{5}-of-(\d{5})" + re.escape(suffix))
            shards = sorted(name for name in available if shard.fullmatch(name))
            total = int(shard.fullmatch(shards[0])[1]) if shards else 0  # type: ignore[index]
            every = [f"{sub}/{stem}-{k:05d}-of-{total:05d}{suffix}" for k in range(1, total + 1)]
            return [index, *(every or [f"{sub}/{stem}-00001-of-?????{suffix}"])]
    return []
