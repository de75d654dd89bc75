"""Labelled pictures for the tests of the evaluation, a perfect classifier of them, and samplers of known quality."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation.classifier import Classifier, Item, Score
from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.evaluation.extractors import FeatureExtractors
from unidiffuser.evaluation.run import EvaluatedModel, Evaluation
from unidiffuser.evaluation.sources import read_source
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


@dataclass(frozen=True)
class Seen:
    label: str
    style: str
    confidence: float = 1.0


class Oracle:
    """A classifier that compares with every picture it knows, and so is never wrong about them."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.labels, self.styles = sorted({p.label for p in pairs}), STYLES
        self.known, self.pixels = pairs, np.stack([np.asarray(p.image(), float) for p in pairs])

    def classify(self, images: Sequence[Image.Image]) -> list[Seen]:
        found = [self.known[np.abs(self.pixels - np.asarray(i, float)).sum((1, 2, 3)).argmin()] for i in images]
        return [Seen(pair.label, pair.style) for pair in found]

    def among(self, labels: object) -> Oracle:
        return self

    def digest(self) -> str:
        return "oracle"


def label_accuracy(
    outputs: Mapping[str, Sequence[Item]], chosen: Mapping[str, Sequence[Pair]], pairs: Sequence[Pair], classifier: Classifier
) -> dict[str, Any]:
    """The simplest score of a classifier's verdicts."""
    rows = []
    for key, items in outputs.items():
        task, split, _ = key.split("/")
        if task in ("autoencode", "text_to_image"):
            right = [item["concept"] == pair.label for item, pair in zip(items, chosen[split], strict=True)]
            rows.append({"task": task, "split": split, "measure": "label", "rate": sum(right) / len(right)})
    return {"judged": rows, "styles": list(classifier.styles), "style_confusion": {}}


class Thumbnails:
    """A feature extractor: 4 x 4 pixels."""

    name = "thumbnails"

    def __call__(self, images: Any) -> Any:
        return F.adaptive_avg_pool2d(to_tensor(images), 4).flatten(1).numpy()


class Painter:
    """A sampler that returns real pictures and captions: the right ones, or with `answer` "random" any."""

    def __init__(self, pairs: list[Pair], answer: str) -> None:
        self.pairs, self.answer = pairs, answer
        self.by_caption = {p.caption: p for p in pairs}
        self.by_pixels = {p.image().tobytes(): p for p in pairs}
        self.calls: list[tuple[str, int]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Painter:  # as EvaluatedModel.sampler
        self.options.append(options)
        return self

    def other(self, pair: Pair, task: str, seed: int) -> Pair:
        self.calls.append((task, seed))
        return pair if self.answer == "right" else random.Random(f"{seed} {task}").choice(self.pairs)

    def autoencode(self, images, seeds):
        return [self.other(self.by_pixels[i.tobytes()], "autoencode", s).image() for i, s in zip(images, seeds, strict=True)]

    def text_to_image(self, captions, seeds):
        return [self.other(self.by_caption[c], "text_to_image", s).image() for c, s in zip(captions, seeds, strict=True)]

    def image_to_text(self, images, seeds):
        return [self.other(self.by_pixels[i.tobytes()], "image_to_text", s).caption for i, s in zip(images, seeds, strict=True)]

    def joint(self, seeds):
        chosen = [random.Random(seed).choice(self.pairs) for seed in seeds]
        return [(self.other(p, "joint", s).image(), p.caption) for p, s in zip(chosen, seeds, strict=True)]

    def image(self, seeds):
        return [self.other(random.Random(s).choice(self.pairs), "image", s).image() for s in seeds]


def score_captions(images, captions, levels, seed):
    """The scores of a network that knows nothing."""
    return np.zeros((len(images), len(captions)), np.float32)


def evaluation(painter: Painter, folder: Path, out: Path, score: Score | None, **changed: Any) -> Evaluation:
    """An evaluation on a labelled folder, with the oracle as its classifier where there is a score."""
    values = {
        "data": {"format": "folder", "path": str(folder)},
        "training": {"format": "folder", "path": str(folder), "where": {"split": "train"}},
        "splits": ["train", "validation", "heldout"],
        "out": str(out),
        "pairs": 48,
        "batch": 16,
    }
    config = EvaluationConfig.of(values | changed)
    classifier = None if score is None else Oracle(read_source(config.data))
    extractors = FeatureExtractors(Thumbnails(), 64, classifier=classifier)
    return Evaluation(config, EvaluatedModel("m", painter, score_captions), extractors, score, progress=False)


def measured(report: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {(r["task"], r["split"], r["measure"]): r for r in report["measures"]}
