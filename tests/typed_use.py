"""A user's script that mypy checks against the installed package: the types of the public interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import unidiffuser
from unidiffuser import NoisePath
from unidiffuser.samplers import Streams, sample

model: unidiffuser.UniDiffuser = unidiffuser.load("emoji", device="cpu", dtype="float32", offload=False)
pictures: list[Image.Image] = model.text_to_image("red apple", count=2, steps=2, guidance=(3.0, 2.0), seed=0)
captions: list[str] = model.image_to_text([pictures[0], np.zeros((8, 8, 3), np.uint8)], steps=2)
pairs: list[tuple[Image.Image, str]] = model.joint(count=1, steps=2)
mask: Image.Image = Image.new("L", pictures[0].size, 255)
painted: list[Image.Image] = model.inpaint(pictures[0], mask, "green apple", steps=2)
changed: list[Image.Image] = model.img2img(pictures[0], "green apple", strength=0.5, steps=2)
candidates = model.caption(pictures[0], candidates=2, beams=3, steps=2)
best: float = candidates[0][0].score
scores = model.score(pictures[0], ["red apple", "wolf"])
path: NoisePath = NoisePath.from_points("1000,1000 400,0 0,0", steps=4)
drawn: unidiffuser.Decoded = model.sample(path, count=1, seed=0)
model.to("cpu", torch.float32)
out: Streams = sample(
    model.net, path, Streams(torch.zeros(1, 4, 32, 32), torch.zeros(1, 1, 128), torch.zeros(1, 12, 64)), guidance=1.0,
    generator=torch.Generator().manual_seed(0),
)  # fmt: skip
pictures[0].save(Path("apple.png"))
words: tuple[int, ...] = path.steps, len(captions), len(pairs), len(painted), len(changed)
