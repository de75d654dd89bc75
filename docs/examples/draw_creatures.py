"""Draw two invented creatures, each with and without a hat: twelve captioned pictures to fine-tune on.

    python docs/examples/draw_creatures.py creatures/
    unidiffuser fine-tune creatures/ --out run

Every picture has its caption in a .txt file of the same name: "zorbi", "zorbi with hat", "plimo" or "plimo with hat". See
docs/fine-tuning.md.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, LARGER = 256, 4  # drawn larger and scaled down, which smooths the edges
EACH = 3  # pictures of each caption
PURPLE, GREEN, ORANGE, YELLOW, BLUE, RED, DARK = "#7e4ac4", "#5ec84a", "#f49228", "#f7c62f", "#2f6fd6", "#e03c3c", "#281c3c"


def draw_creature(name: str, hat: bool, chance: random.Random) -> Image.Image:
    """One picture: place, size and gaze are drawn at random.

    Args:
        name: "zorbi", purple and round with one eye, or "plimo", yellow and square with two.
        hat: a red hat.
        chance: source of the random numbers.
    """
    full = SIDE * LARGER
    picture = Image.new("RGB", (full, full), "white")
    pen = ImageDraw.Draw(picture)
    size = full * chance.uniform(0.26, 0.32)
    x, y, gaze = full * chance.uniform(0.44, 0.56), full * chance.uniform(0.54, 0.6), chance.uniform(-0.12, 0.12)

    def box(dx: float, dy: float, width: float, height: float) -> list[float]:
        return [x + (dx - width) * size, y + (dy - height) * size, x + (dx + width) * size, y + (dy + height) * size]

    def eye(dx: float, dy: float, radius: float) -> None:
        pen.ellipse(box(dx, dy, radius, radius), fill="white")
        pen.ellipse(box(dx + gaze, dy, radius / 2, radius / 2), fill=DARK)

    for side in (-1, 1):
        pen.ellipse(box(0.45 * side, 1.0, 0.28, 0.2), fill=ORANGE if name == "zorbi" else BLUE)  # feet
    if name == "zorbi":
        for side in (-1, 1):
            pen.line([x + 0.5 * side * size, y - 0.7 * size, x + 0.85 * side * size, y - 1.2 * size], GREEN, int(0.14 * size))
            pen.ellipse(box(0.85 * side, -1.2, 0.2, 0.2), fill=GREEN)
        pen.ellipse(box(0, 0, 1, 1), fill=PURPLE)
        eye(0, -0.2, 0.5)
    else:
        pen.rounded_rectangle(box(0, 0, 0.9, 0.95), 0.25 * size, fill=YELLOW)
        for side in (-1, 1):
            eye(0.4 * side, -0.25, 0.28)
    pen.arc(box(0, 0.35, 0.4, 0.25), 15, 165, DARK, int(0.1 * size))
    if hat:
        pen.rectangle(box(0, -0.92, 0.75, 0.1), fill=RED)
        pen.rectangle(box(0, -1.3, 0.42, 0.4), fill=RED)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the pictures and their captions")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for name in ("zorbi", "plimo"):
        for hat in (False, True):
            caption = f"{name} with hat" if hat else name
            for number in range(EACH):
                path = folder / f"{caption.replace(' ', '-')}-{number}.png"
                draw_creature(name, hat, chance).save(path)
                path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    print(f"drew {4 * EACH} pictures into {folder}")


if __name__ == "__main__":
    main()
