"""What a LoRA learns and what it costs: an invented creature that no part of the bundled model has seen.

    python -m unidiffuser.emoji.studies.lora draw zorbi/                # zorbi/learn (8 pictures) and zorbi/held-back (6)
    unidiffuser train-lora zorbi/learn --word zorbi --out runs/zorbi
    python -m unidiffuser.emoji.studies.lora ask zorbi/ before.json
    python -m unidiffuser.emoji.studies.lora ask zorbi/ after.json --lora runs/zorbi/lora.safetensors --sheet zorbi.jpg
    python -m unidiffuser.emoji.studies.lora compare before.json after.json

`ask` draws the word with sixteen seeds and finds the nearest real picture of each in the model's own CLIP image space (among
the demonstration pictures and the held-back creatures), captions the creature's pictures with three seeds, and scores trained
pairs in both directions with the judge. Seeds are the same for every model; steps and guidance are the model's own.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ...data.captioned import read_listed
from ...media.images import contact_sheet, open_image
from ...pipeline import load
from ..judge import load_judge

WORD, SIDE, OVERSAMPLING, BATCH, DRAWN = "zorbi", 256, 2, 48, 16
BODIES = ((126, 74, 196), (140, 86, 210), (112, 62, 178))
GREEN, ORANGE, RED, BLUE, DARK = (94, 200, 74), (244, 146, 40), (230, 60, 60), (60, 140, 230), (40, 20, 60)


def zorbi(rng: random.Random, number: int) -> Image.Image:
    """One eye, two green feelers, orange feet, purple; place, size, tilt, shade, gaze, mouth and what it wears vary."""
    full = SIDE * OVERSAMPLING
    x, y = full / 2 + rng.uniform(-40, 40), full / 2 + 20 + rng.uniform(-30, 30)
    radius, tilt = rng.uniform(115, 165), rng.uniform(-0.25, 0.25)
    body, gaze = BODIES["abc".index(rng.choice("abc"))], rng.choice([-1, 0, 1])
    picture = Image.new("RGB", (full, full), "white")
    pen = ImageDraw.Draw(picture)

    def at(dx: float, dy: float) -> tuple[float, float]:
        return (
            x + radius * (dx * math.cos(tilt) - dy * math.sin(tilt)),
            y + radius * (dx * math.sin(tilt) + dy * math.cos(tilt)),
        )

    def disc(dx: float, dy: float, size: float, colour: tuple[int, ...]) -> None:
        (cx, cy), r = at(dx, dy), size * radius
        pen.ellipse([cx - r, cy - r, cx + r, cy + r], fill=colour)

    for side in (-1, 1):
        pen.line([at(0.35 * side, -0.8), at(0.6 * side, -1.35)], fill=GREEN, width=int(0.14 * radius))
        disc(0.62 * side, -1.4, 0.2, GREEN)
    for side in (-1, 1):
        disc(0.45 * side, 1.0 + 0.06 * gaze * side, 0.28, ORANGE)
    disc(0, 0, 1, body)
    disc(0, 0.3, 0.55, tuple(min(255, c + 50) for c in body))
    disc(0, -0.22, 0.5, (255, 255, 255))
    disc(0.1 * gaze, -0.2, 0.24, (30, 30, 40))
    disc(0.1 * gaze + 0.08, -0.3, 0.08, (255, 255, 255))
    cx, cy = at(0, 0.48)
    if number % 3 == 0:
        box = [cx - 0.35 * radius, cy - 0.25 * radius, cx + 0.35 * radius, cy + 0.25 * radius]
        pen.arc(box, 10, 170, fill=DARK, width=int(0.09 * radius))
    elif number % 3 == 1:
        disc(0, 0.58, 0.16, (60, 20, 50))
    else:
        pen.line([at(-0.3, 0.55), at(0.3, 0.55)], fill=DARK, width=int(0.09 * radius))
    if number % 4 == 1:
        pen.polygon([at(-0.35, -0.9), at(0.35, -0.9), at(0, -1.6)], fill=RED)
    elif number % 4 == 2:
        pen.line([at(-0.85, 0.55), at(0.85, 0.55)], fill=BLUE, width=int(0.18 * radius))
    elif number % 4 == 3:
        for k in range(3):
            disc(-0.6 + 0.6 * k, 0.05 if k != 1 else 0.75, 0.09, tuple(int(c * 0.72) for c in body))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw(folder: Path) -> None:
    for part, count, seed in (("learn", 8, 1), ("held-back", 6, 7)):
        rng = random.Random(seed)
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            zorbi(rng, number).save(folder / part / f"zorbi-{number}.png")


def opened(folder: Path) -> list[Image.Image]:
    return [open_image(path) for path in sorted(folder.glob("*.png"))]


def tokens(model: Any, pictures: list[Image.Image]) -> torch.Tensor:
    """Directions (N, D) in the space of the model's CLIP image encoder."""
    parts = [model.image_token_encoder(pictures[i : i + 64])[:, 0] for i in range(0, len(pictures), 64)]
    return F.normalize(torch.cat(parts).float(), dim=1)


def ask(folder: Path, out: Path, data: Path, lora: str | None, sheet: Path | None, count: int) -> None:
    model, judge = load("emoji", lora=[(lora, 1.0)] if lora else []), load_judge()
    learned, held = opened(folder / "learn"), opened(folder / "held-back")
    pairs = [pair for pair in read_listed(data) if pair.fields["tone"] == 0]

    made = model.text_to_image(WORD, count=DRAWN, seed=0)
    real = tokens(model, [pair.image() for pair in pairs] + held)
    names = [pair.caption for pair in pairs] + [WORD] * len(held)
    nearest = [names[i] for i in (tokens(model, made) @ real.T).argmax(1).tolist()]
    captioned = [model.image_to_text(learned + held, seed=seed) for seed in range(3)]
    if sheet is not None:
        under = [f"{n} is nearest" for n in nearest] + [f"= {c}" for c in captioned[0]]
        contact_sheet(made + learned + held, under, 8).save(sheet, quality=92)

    asked = [p for p in pairs if p.fields["demo"] and p.split == "train" and p.label in judge.labels]
    asked = random.Random(0).sample(asked, len(asked))[:count]
    drawn: list[bool] = []
    named: list[bool] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        pictures = model.text_to_image([p.caption for p in part], seed=start)
        drawn += [v.label == p.label for v, p in zip(judge.classify(pictures), part, strict=True)]
        captions = model.image_to_text([p.path for p in part], seed=start)
        named += [c.split(",")[0] == p.label for c, p in zip(captions, part, strict=True)]
    found = {"nearest": nearest, "captions": captioned, "learned": len(learned), "text_to_image": drawn, "image_to_text": named}
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def compare(before: Path, after: Path) -> None:
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    for task in ("text_to_image", "image_to_text"):
        change = [int(b) - int(a) for a, b in zip(old[task], new[task], strict=True)]
        mean, n = sum(change) / len(change), len(change)
        error = math.sqrt(sum((c - mean) ** 2 for c in change) / n / n)
        rates = (100 * sum(x[task]) / n for x in (old, new))
        print("{}: {:.1f} -> {:.1f} %, {:+.1f} +- {:.1f} points, n {}".format(task, *rates, 100 * mean, 196 * error, n))
    for name, found in (("before", old), ("after", new)):
        split = found["learned"]
        for what, part in (("learned", slice(split)), ("held back", slice(split, None))):
            captions = [caption for seed in found["captions"] for caption in seed[part]]
            named = sum(caption.split(",")[0] == WORD for caption in captions)  # "zorbi, fluent" is the word and a style
            counts = f"{named} of {len(captions)} captions of {what} pictures start with {WORD}"
            print(f"{name}: {counts}, {captions.count(WORD)} are only that")
        print(f"{name}: the nearest real picture is a {WORD} for {found['nearest'].count(WORD)} of {len(found['nearest'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("folder", type=Path)
    drawing.set_defaults(run=draw)
    asking = commands.add_parser("ask")
    asking.add_argument("folder", type=Path)
    asking.add_argument("out", type=Path)
    asking.add_argument("--data", type=Path, default=Path("data/emoji"))
    asking.add_argument("--lora")
    asking.add_argument("--sheet", type=Path, help="write a sheet of the pictures and captions here")
    asking.add_argument("--count", type=int, default=480, help="trained pairs that the judge looks at")
    asking.set_defaults(run=ask)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(run=compare)
    arguments = vars(parser.parse_args())
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    main()
