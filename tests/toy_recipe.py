"""A recipe of seconds on a CPU: twelve pictures, all sections, tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw

SIDE = 32
STYLES = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 200, 30)}
SHAPES = {"circle": (6, 6, 26, 26), "square": (8, 8, 24, 24), "bar": (4, 13, 28, 19)}
EVERY: dict[str, Any] = {"style": list(STYLES)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: runs that must agree to the last bit have one thread each, here and in processes that a test kills."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_pictures(folder: Path) -> Path:
    """Twelve pictures, three concepts in four styles, each with two captions: "circle, red" and "circle"."""
    folder.mkdir(parents=True)
    rows = []
    for style, colour in STYLES.items():
        for shape, box in SHAPES.items():
            image = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
            draw = ImageDraw.Draw(image)
            (draw.ellipse if shape == "circle" else draw.rectangle)([2 * x for x in box], fill=colour)
            image.save(folder / f"{style}-{shape}.png")
            texts = [f"{shape}, {style}", shape]
            rows.append({"file_name": f"{style}-{shape}.png", "text": texts, "label": shape, "style": style, "split": "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def toy(data: Path, steps: int = 12, save_every: int = 4) -> dict[str, Any]:
    """The recipe as plain values; every training run has so many steps."""
    run = {"steps": steps, "batch_size": 12, "learning_rate": 3.0e-3, "warmup_steps": 4, "save_every": save_every,
           "ema_decay": 0.95, "where": EVERY}  # fmt: skip
    return {
        "precision": "no",
        "data": {"folder": str(data)},
        "autoencoder": run | {"image_size": SIDE, "patch_size": 4, "channels": [32], "layers": 1, "mse_weight": 3.0,
                              "noise": 0.2, "palette": {"styles": list(STYLES), "colours": 4}},
        "encoders": {
            "text": run | {"image_size": SIDE, "vocabulary_size": 560, "text_tokens": 8, "width": 64, "layers": 1,
                           "image_patch": 16, "projection": 16},
            "image": run | {"image_size": SIDE, "width": 32, "layers": 1, "heads": 2, "projection": 16, "patch_size": 8,
                            "stem": {"unshuffle": 4, "channels": [16, 32]}, "place": 0.5, "colour": 0.3, "shade": 0.1,
                            "noise": 0.1, "restyle": 0.3},
        },
        "captioner": run | {"batch_size": 16, "vocabulary_size": 300, "hidden_dim": 16, "width": 64, "layers": 1,
                            "max_new_tokens": 8, "noise": 0.3},
        "network": run | {
            "batch_size": 32, "optimizer": "muon", "with_style": 0.7,
            "sizes": {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2, "sigma_data": 0.3, "detail_width": 8,
                      "detail_inner": 8, "detail_cond": 4},
            "mix": {"independent": 2, "clean_text": 1, "clean_image": 1},
            "weights": {"text": 5}, "lean": 0.3, "logit_normal": [0.0, 1.0],
            "captioning": {"where": EVERY, "versions": 2, "place": 0.3, "other_latent": 0.5},
            "drawing": {"where": EVERY, "fraction": 0.5, "fraction_below": 0.8, "changed_below": 500, "shift": 2,
                        "other_start": 0.4, "other_start_from": 500, "other_picture": 0.3, "with_style": 0.7},
            "suggested": {"steps": 5, "guidance": 2.0, "speeds": [1, 2]},
            "sample_prompts": ["circle, red"],
        },
        "finish": run | {"image_size": 2 * SIDE, "upsampler": {"features": 4, "width": 8}, "crop": 6, "psnr_weight": 0.05,
                         "batch_size": 8, "noise": 0.3, "clean": 0.3, "denoised": 0.5, "labels": [50, 600],
                         "random_colours": 0.1, "gate": 4.0},
    }  # fmt: skip


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
