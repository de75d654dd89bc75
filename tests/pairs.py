"""Small sets of captioned pictures: as a folder, as webdataset shards of img2dataset's kind, as latent shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw

SIDE = 64  # pixels; 8 x 8 latents of the bundled model
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
"""A picture that is a program; Pillow hands it to Ghostscript."""


def picture(number: int, side: int = SIDE) -> tuple[Image.Image, str]:
    """A coloured shape and its caption."""
    colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    box = (side // 5 + number % 3, side // 5, side * 4 // 5, side * 4 // 5 - number % 4)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    return image, f"{colour} {shape}"


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A webdataset shard: key -> {ending: bytes}."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tar_samples(first: int, count: int) -> dict[str, dict[str, bytes]]:
    """Whole samples as img2dataset writes them."""
    samples = {}
    for k in range(first, first + count):
        image, caption = picture(k)
        meta = json.dumps({"key": f"{k:09d}", "caption": caption, "status": "success", "width": SIDE, "height": SIDE})
        samples[f"{k:09d}"] = {"jpg": encoded(image, "JPEG"), "txt": caption.encode(), "json": meta.encode()}
    return samples


def latent_folder(out: Path, shards: int = 5, per_shard: int = 7) -> Path:
    """Shards of random latents in the bundled model's sizes at 32 px, which needs no encoder."""
    from unidiffuser.data.shards import write_shard

    listed = []
    for number in range(shards):
        generator = torch.Generator().manual_seed(number)
        path = out / f"{number:05d}.safetensors"
        tensors = {
            "mean": torch.randn(per_shard, 4, 4, 4, generator=generator).half(),
            "std": torch.full((per_shard, 4, 4, 4), 0.1).half(),
            "clip_img": torch.randn(per_shard, 1, 128, generator=generator).half(),
            "text": torch.randn(2 * per_shard, 12, 64, generator=generator).half(),
            "first": torch.arange(0, 2 * per_shard + 1, 2),
        }
        notes = {"keys": [f"{number}-{k}" for k in range(per_shard)], "read": per_shard, "dropped": {}, "source_size": 1}
        write_shard(path, tensors, notes)
        listed.append({"name": path.name, "samples": per_shard, "bytes": path.stat().st_size})
    settings = {"image_size": SIDE, "min_side": 1, "text_tokens": 12}
    manifest = {"encoding": settings, "samples": shards * per_shard, "read": shards * per_shard, "dropped": {}, "damaged": {},
                "shards": listed}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def random_latents(out: Path, shapes: Mapping[str, tuple[int, ...]], pairs: int) -> Path:
    """A shard of pairs of random latents in a network's `item_shapes`, with two captions each."""
    from unidiffuser.data.shards import MANIFEST, write_shard

    generator = torch.Generator().manual_seed(0)

    def draw(count: int, name: str) -> torch.Tensor:
        return torch.randn(count, *shapes[name], generator=generator).half()

    tensors = {"mean": draw(pairs, "img"), "std": draw(pairs, "img").abs() / 10, "clip_img": draw(pairs, "clip_img")}
    path = out / "00000.safetensors"
    first = torch.arange(0, 2 * pairs + 1, 2)
    write_shard(path, tensors | {"text": draw(2 * pairs, "text"), "first": first}, {"keys": list("abcdefgh"[:pairs])})
    shard = {"name": path.name, "samples": pairs, "bytes": path.stat().st_size}
    (out / MANIFEST).write_text(json.dumps({"encoding": {"image_size": 128}, "samples": pairs, "shards": [shard]}))
    return out


TINY = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 1,
    "patch_size": 2,
    "text_dim": 64,
    "num_text_tokens": 12,
    "clip_img_dim": 128,
}
"""Sizes of a network for these shards."""
