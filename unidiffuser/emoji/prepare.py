"""The demonstration data: emoji pictures with captions and the split, as an ordinary image folder with `metadata.jsonl`.

The network draws four styles. Three more emoji sets show encoders and judge the same concepts in other styles; their captions
are the label alone. Every record belongs to one split, fixed before any component is trained:

    train            seen by every component
    validation       about 5 % of the (concept, style) pairs, for choosing guidance, steps and early stopping
    heldout          about 10 % of the pairs: the concept is shown in its other styles, never in this one
    heldout_concept  concepts that no component sees in any style
    copy             pictures of the other sets that nearly equal a picture kept from training; no component sees them
"""

from __future__ import annotations

import json
import logging
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.captioned import INDEX
from ..media.files import write_text
from ..media.images import open_image
from .packages import LABELS_PACKAGE, MORE_PACKAGES, PACKAGES, STYLES, download, icon_names, icon_svgs, read_labels, render

log = logging.getLogger(__name__)

SPLIT_SEED = 20230312  # never change it: the published split depends on it
HELDOUT_FRACTION, VALIDATION_FRACTION, HELDOUT_CONCEPTS = 0.10, 0.05, 60
COPY_DISTANCE = 0.06  # mean difference of thumbnails, in [0, 1], below which a picture is a copy
CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
SIZE = 256  # pixels, the bundled model's own size
RECORD = "prepared.json"  # how the folder was made; complete as soon as the index is there
SPLIT_FILE = Path(__file__).with_name("split.csv")  # every pair that is not for training


@dataclass(frozen=True)
class Record:
    """One picture and its captions.

    Attributes:
        file_name: relative to the folder.
        text: captions: "label, style" and "label", or the label alone.
        label, style: the concept's English name, and the emoji set.
        hexcode, base: code points of the picture, and without its skin tone.
        tone: skin tone 1..5, 0 for none, or "mixed".
        group, tags: emojibase's group number and search words.
        split: see the module.
        known: shows a concept of the bundled model.
        demo: known, and in one of its four styles.
    """

    file_name: str
    text: list[str]
    label: str
    style: str
    hexcode: str
    base: str
    tone: str | int
    group: int
    tags: list[str]
    split: str
    demo: bool
    known: bool


def assign_splits(pairs: set[tuple[str, str]], demo: set[str]) -> dict[tuple[str, str], str]:
    """The split of each pair (base hexcode, style); independent of the order of `pairs`.

    A concept gives at most one style to `heldout` and one to `validation`, and only if three or more show it, so every concept
    tested in one style is trained in others.
    """
    rng = random.Random(SPLIT_SEED)
    styles: dict[str, list[str]] = {}
    for base, style in sorted(pairs):
        styles.setdefault(base, []).append(style)
    others = sorted(set(styles) - demo)
    unseen = set(rng.sample(others, min(HELDOUT_CONCEPTS, len(others))))
    out: dict[tuple[str, str], str] = {}
    for base in sorted(styles):
        shown = styles[base]
        order = rng.sample(shown, len(shown))
        held, val = rng.random() < HELDOUT_FRACTION * len(shown), rng.random() < VALIDATION_FRACTION * len(shown)
        for index, style in enumerate(order):
            split = "train"
            if base in unseen:
                split = "heldout_concept"
            elif len(shown) >= 3 and index == 0 and held:
                split = "heldout"
            elif len(shown) >= 3 and index == 1 and val:
                split = "validation"
            out[base, style] = split
    return out


def near_copies(rows: list[tuple[str, str, Path]], hidden: list[tuple[str, str, Path]], labels: dict[str, dict]) -> set[Path]:
    """Pictures of `rows` that nearly equal one of `hidden` of the same concept; rows are (style, hexcode, path).

    Emoji sets have copied drawings from one another and from their own earlier versions.
    """
    thumbnails: dict[str, list[np.ndarray]] = {}
    for _, code, path in hidden:
        thumbnails.setdefault(labels[code]["base"], []).append(thumbnail(path))
    found = set()
    for _, code, path in rows:
        others = thumbnails.get(labels[code]["base"], [])
        if others and min(np.abs(thumbnail(path) - other).mean() for other in others) < COPY_DISTANCE:
            found.add(path)
    return found


def thumbnail(path: Path, side: int = 32) -> np.ndarray:
    """A picture reduced to (side, side, 3), in [0, 1]."""
    return np.asarray(open_image(path).resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255


def demo_concepts() -> set[str]:
    """Hexcodes of the concepts that the bundled model is trained on (`concepts.txt`)."""
    lines = CONCEPTS_FILE.read_text(encoding="utf-8").splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def split_rows(splits: dict[tuple[str, str], str]) -> list[str]:
    """The pairs kept from training as rows "base hexcode,style,split", the form of `split.csv`."""
    return [f"{base},{style},{split}" for (base, style), split in sorted(splits.items()) if split != "train"]


def prepare(out: Path, size: int = SIZE, packages: Path | None = None, workers: int = 2) -> int:
    """Download, render and caption everything; write `metadata.jsonl` and `images/`. A finished folder is left as it is.

    Args:
        out: the image folder to make.
        size: side of the square pictures in pixels.
        packages: folder of the npm packages; `out/packages` when absent.
        workers: rendering processes.

    Returns:
        the number of pictures.

    Raises:
        ValueError: the folder has other pictures; or the packages give another split than the published one.
    """
    settings = {"size": size, "packages": [*PACKAGES.values(), *MORE_PACKAGES.values(), LABELS_PACKAGE]}
    if (out / INDEX).is_file():
        found = json.loads((out / RECORD).read_text(encoding="utf-8")) if (out / RECORD).is_file() else {}
        if {name: found.get(name) for name in settings} != settings:
            how = f"pictures of {found['size']} px" if "size" in found else "pictures made otherwise"
            raise ValueError(f"{out} has {how}, not {size} px of these packages; remove it, or name another folder")
        return int(found["pictures"])
    packages = packages or out / "packages"
    download(packages)
    labels = read_labels(packages)
    names = icon_names(packages, labels)
    (out / "images").mkdir(parents=True, exist_ok=True)
    demo = demo_concepts()
    jobs = [
        (style, code, svg) for style in (*STYLES, *MORE_PACKAGES) for code, svg in icon_svgs(packages, style, labels, names)
    ]
    paths = [out / "images" / f"{style}-{code.lower()}.png" for style, code, _ in jobs]
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(render, [svg for *_, svg in jobs], [size] * len(jobs), paths, chunksize=64))
    kept = [(style, code, path) for (style, code, _), path, ok in zip(jobs, paths, drawn, strict=True) if ok]
    splits = assign_splits({(labels[code]["base"], style) for style, code, _ in kept if style in STYLES}, demo)
    if split_rows(splits) != SPLIT_FILE.read_text(encoding="utf-8").splitlines()[1:]:
        raise ValueError(
            f"the split of these packages differs from {SPLIT_FILE.name}, so pairs kept from the bundled model would mix "
            f"with its training pairs; use {', '.join(PACKAGES.values())}, and remove {packages} if it is damaged"
        )
    unseen = {base for (base, _), split in splits.items() if split == "heldout_concept"}
    hidden = [row for row in kept if row[0] in STYLES and splits[labels[row[1]]["base"], row[0]] != "train"]
    copies = near_copies([row for row in kept if row[0] in MORE_PACKAGES], hidden, labels)
    records = []
    for style, code, path in kept:
        label, base, ours = labels[code]["label"], labels[code]["base"], style in STYLES
        split = splits[base, style] if ours else "heldout_concept" if base in unseen else "copy" if path in copies else "train"
        known = base in demo and labels[code]["tone"] == 0
        records.append(
            Record(
                file_name=str(path.relative_to(out)),
                text=[f"{label}, {style}", label] if ours else [label],
                style=style,
                hexcode=code,
                split=split,
                demo=known and ours,
                known=known,
                **labels[code],
            )
        )
    write_text(out / RECORD, json.dumps(settings | {"pictures": len(records)}))
    write_text(out / INDEX, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
    return len(records)
