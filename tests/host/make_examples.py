"""Makes the example images in nodes/pictures: trained pairs that the bundled model captions correctly with any seed.

    python tests/host/make_examples.py data/emoji [--seeds 6]

copies them from the folder of `unidiffuser.emoji prepare` and prints how many captions of each are correct.
"""

# ruff: noqa: E402 (the path of the library comes first)
from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import unidiffuser

logger = logging.getLogger("make_examples")
FOLDER = ROOT / "nodes/pictures"
STYLE = "noto"  # its licence is also the project's
LABELS = ["bicycle", "fox", "frog", "house", "lion", "penguin", "rocket", "sunflower"]


def trained_pictures(data: Path) -> dict[str, Path]:
    """{label: file} of LABELS; ValueError if one is not a pair that the bundled model was trained on."""
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["label"]: row for row in map(json.loads, lines) if row["style"] == STYLE and row["tone"] == 0}
    untrained = [name for name in LABELS if rows[name]["split"] != "train" or not rows[name]["demo"]]
    if untrained:
        raise ValueError(f"Not trained pairs: {', '.join(untrained)}. Choose others in LABELS.")
    return {name: data / rows[name]["file_name"] for name in LABELS}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of `python -m unidiffuser.emoji prepare`")
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    for old in FOLDER.glob("*.png"):
        old.unlink()
    pictures = []
    for name, file in trained_pictures(options.data).items():
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
        pictures[-1].save(FOLDER / f"{name}.png", optimize=True)
    model = unidiffuser.load("emoji")
    captions = [model.image_to_text(pictures, seed=seed * len(LABELS)) for seed in range(options.seeds)]
    for name, found in zip(LABELS, zip(*captions, strict=True), strict=True):
        right = sum(caption.partition(",")[0] == name for caption in found)
        logger.info("%-10s %d of %d  %s", name, right, len(found), sorted(set(found)))


if __name__ == "__main__":
    main()
