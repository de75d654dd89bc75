"""Random weights of the published size (952 M, 5.3 GB in float32) in the three layouts, written one tensor at a time.

python -m benchmarks.published_size FOLDER [--layouts own,original,diffusers]
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiffuser.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiffuser.checkpoints.config import V1, ModelConfig
from unidiffuser.checkpoints.export import export_original
from unidiffuser.checkpoints.keys import PARTS, apply, uvit_to_diffusers, vae_to_diffusers
from unidiffuser.checkpoints.layout_diffusers import FOLDERS
from unidiffuser.checkpoints.layout_own import write_own
from unidiffuser.checkpoints.parts import make_part
from unidiffuser.checkpoints.skeleton import skeleton
from unidiffuser.checkpoints.weights import shape_of, write_safetensors
from unidiffuser.encoders.autoencoder import autoencoder_kl
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.encoders.clip import clip_image_model, clip_text_model
from unidiffuser.small.network import build

LAYOUTS = {"own": "own.safetensors", "original": "original", "diffusers": "diffusers"}
"""Name of the file or folder of each layout."""
CLIP_FOLDERS = {"clip_text": "clip-vit-large-patch14", "clip_image": "clip-vit-base-patch32"}

BLOCK = 1 << 20  # numbers drawn for a tensor, then repeated: a billion would take minutes


class RandomTensors(Mapping[str, Tensor]):
    """Tensors that are drawn when they are asked for, each from a seed of its name; has the interface of `WeightFiles`."""

    name = "random weights"

    def __init__(self, shapes: dict[str, Tensor]):
        self.shapes = shapes

    def open(self) -> RandomTensors:
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if not shape.dtype.is_floating_point:
            return torch.zeros(shape.shape, dtype=shape.dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        block = torch.randn(min(shape.numel(), BLOCK), generator=generator) * 0.02
        block += name.endswith("weight") and shape.ndim == 1  # gains of norms are near 1
        return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape.shape)


def shapes_of(config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """For each part its tensors on "meta", under canonical names."""
    with skeleton():
        modules = {
            "uvit": build(config.uvit), "vae": autoencoder_kl(config.vae), "clip_text": clip_text_model(config.clip_text),
            "clip_image": clip_image_model(config.clip_image), "caption": CaptionDecoder(config.caption),
        }  # fmt: skip
    tied = "gpt.lm_head.weight"  # to the input embedding
    return {
        part: {name: shape_of(tensor) for name, tensor in modules[part].state_dict().items() if name != tied} for part in PARTS
    }


def write_random(folder: Path, layout: str, config: ModelConfig = V1) -> Path:
    """Write a checkpoint with random weights, equal in all layouts; returns its file or folder."""
    path, own = folder / LAYOUTS[layout], folder / LAYOUTS["own"]
    if not own.is_file():
        parts = {name: make_part(name, RandomTensors(shapes)) for name, shapes in shapes_of(config).items()}  # type: ignore[arg-type]
        write_own(own, config, parts, {}, None)
    if layout == "original":
        checkpoint = load_checkpoint(own)
        export_original(checkpoint, path)
        for part, name in CLIP_FOLDERS.items():
            _write(checkpoint.state_dict(part), path / name / "model.safetensors", _clip_config(checkpoint, part))
    elif layout == "diffusers":
        _write_diffusers(load_checkpoint(own), path)
    return path


def _write(tensors: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """A part's weights, and its config.json beside them."""
    shapes = {name: shape_of(tensor) for name, tensor in tensors.items()}

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        yield from tensors.items()

    write_safetensors(path, shapes, one_by_one, {"format": "pt"})
    path.with_name("config.json").write_text(json.dumps(config))


def _clip_config(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    fields = getattr(checkpoint.config, part)
    kind = "clip_text_model" if part == "clip_text" else "clip_vision_model"
    return {"model_type": kind} | {name: value for name, value in fields.items() if not name.startswith("image_m")}


def _write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    configs = {
        "uvit": {"num_attention_heads": config.uvit.num_heads, "num_text_tokens": config.uvit.num_text_tokens},
        "vae": {"scaling_factor": config.vae.scale_factor, "norm_num_groups": 32},
        "clip_text": _clip_config(checkpoint, "clip_text"),
        "clip_image": _clip_config(checkpoint, "clip_image"),
        "caption": {"n_head": config.caption.gpt2["n_head"], "prefix_length": config.caption.prefix_length},
    }
    for part, (sub, stem) in FOLDERS.items():
        tensors = checkpoint.state_dict(part)
        if part == "uvit":
            tensors = apply(uvit_to_diffusers(tensors), tensors)
        elif part == "vae":
            tensors = apply(vae_to_diffusers(tensors), tensors)
        elif part == "caption":
            tensors = {name.replace("gpt.", "transformer.", 1): tensor for name, tensor in tensors.items()}
        _write(tensors, folder / sub / f"{stem}.safetensors", configs[part])
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "UniDiffuserPipeline"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    args = parser.parse_args()
    for layout in args.layouts.split(","):
        print(write_random(args.folder, layout), flush=True)


if __name__ == "__main__":
    main()
