"""Labelled pictures for the tests of the evaluation, and a judge that is never wrong about them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from unidiffuser.data.captioned import Pair
from unidiffuser.emoji.judge import Judge
from unidiffuser.evaluation.metrics import nearest
from unidiffuser.media.images import to_tensor

STYLES = ("noto", "twemoji", "flat", "fluent")
CONCEPTS = 12
SIDE = 64


def draw(concept: int, style: int) -> Image.Image:
    """A concept is where a block stands and how wide it is; a style is its ink and its outline."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    x, y, wide = 6 + 14 * (concept % 4), 6 + 18 * (concept // 4), 8 + 2 * (concept % 3)
    ink = ["red", "green", "blue", "black"][style]
    ImageDraw.Draw(image).rectangle((x, y, x + wide, y + wide), fill=ink, outline="black", width=1 + style)
    return image


def labelled_folder(root: Path) -> Path:
    """A labelled image folder: concept k is held out in style k mod 4, every third concept validates in the next style."""
    lines = []
    for concept in range(CONCEPTS):
        for index, style in enumerate(STYLES):
            name = f"{style}-{concept}.png"
            draw(concept, index).save(root / name)
            split = "heldout" if concept % 4 == index else "train"
            if concept % 3 == 0 and (concept + 1) % 4 == index:
                split = "validation"
            label = f"thing, {concept}"
            lines.append(
                {
                    "file_name": name,
                    "text": [f"{label}, {style}", label],
                    "label": label,
                    "style": style,
                    "tone": 0,
                    "demo": True,
                    "split": split,
                }
            )
    root.joinpath("metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


class Oracle(Judge):
    """Compares with every picture that it knows."""

    def __init__(self, pairs: list[Pair]) -> None:
        super().__init__(sorted({p.label for p in pairs}), STYLES, (1, 1, 1, 1))
        self.known, self.pictures = pairs, to_tensor([p.image() for p in pairs])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = [self.known[k] for k in nearest(images, self.pictures).tolist()]
        concepts = torch.tensor([[20.0 * (p.label == c) for c in self.concepts] for p in found])
        return concepts, torch.tensor([[20.0 * (p.style == s) for s in self.styles] for p in found])

    def digest(self) -> str:
        return "oracle"

    def among(self, concepts: object) -> Judge:
        return self
