"""The demonstration data: emoji pictures with captions, made from npm packages of clear licence.

The pictures are SVG sets republished by Iconify (noto: Apache-2.0, twemoji: CC BY 4.0, fluent and fluent flat: MIT); the
captions are the English labels of emojibase-data (MIT). The result is an ordinary image folder (``metadata.jsonl`` beside
the pictures), which `unidiffuser.data.captioned` reads like any other.

The network draws four styles. Three more houses (noto-v1 and fxemoji: Apache-2.0, EmojiOne 2: CC BY 4.0) show encoders the same
concepts in other drawings; their captions are the label alone.

Every record belongs to one split, fixed here before any component is trained:

``train``
    what every component may see.
``validation``
    about 5 % of the (concept, style) pairs; guidance, steps and early stopping are chosen on them.
``heldout``
    about 10 % of the (concept, style) pairs; the concept is shown in its other styles, this pair is never shown.
``heldout_concept``
    concepts that no component sees in any style.
``copy``
    pictures of the other houses that nearly are a picture kept from training; no component sees them.
"""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

PACKAGES = {  # style word used in captions -> npm package
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
}
MORE_PACKAGES = {  # other houses: what shows encoders a concept in more ways than the network draws it
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
LABELS_PACKAGE = "emojibase-data@17.0.0"
STYLES = tuple(PACKAGES)
SPLIT_SEED = 20230312  # the paper's date on arXiv; never change it, the published split depends on it
HELDOUT_SHARE, VALIDATION_SHARE, HELDOUT_CONCEPTS = 0.10, 0.05, 60
COPY_DISTANCE = 0.06  # mean difference of thumbnails, in [0, 1], below which a picture is a copy
CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
SPLIT_FILE = Path(__file__).with_name("split.csv")  # every pair that is not for training


@dataclass(frozen=True)
class Record:
    """One picture of the set: where it is, what it shows and which split it belongs to.

    ``known`` pictures show a concept of the bundled model, ``demo`` ones in one of its styles.
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


def download(folder: Path) -> None:
    """Fetch the npm packages with the npm client and unpack them below ``folder`` (skipped where already there)."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in [*PACKAGES.values(), *MORE_PACKAGES.values(), LABELS_PACKAGE]:
        target = package_folder(folder, spec)
        if target.is_dir():
            continue
        log.info("fetching %s", spec)
        done = subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / done.stdout.strip().splitlines()[-1]
        partial = target.with_name(target.name + ".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").rename(target)
        partial.rmdir()
        archive.unlink()


def package_folder(folder: Path, spec: str) -> Path:
    return folder / re.sub(r"[^\w.-]+", "-", spec).strip("-")


def normalise_hex(code: str) -> str:
    """Code points without variation selectors and leading zeros: the two sources spell them differently."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F").lstrip("0")


def read_labels(folder: Path) -> dict[str, dict]:
    """hexcode -> label, tags, group, skin tone and base hexcode, from emojibase."""
    rows = json.loads((package_folder(folder, LABELS_PACKAGE) / "en" / "data.json").read_text(encoding="utf-8"))
    out: dict[str, dict] = {}
    for row in rows:
        if row.get("group") is None:
            continue
        base = normalise_hex(row["hexcode"])
        shared = {"tags": row.get("tags", []), "group": row["group"], "base": base}
        out[base] = {"label": row["label"].lower(), "tone": 0, **shared}
        for skin in row.get("skins", []):
            tone = skin.get("tone")
            out[normalise_hex(skin["hexcode"])] = {
                "label": skin["label"].lower(),
                "tone": tone if isinstance(tone, int) else "mixed",
                **shared,
            }
    return out


def icon_svgs(folder: Path, style: str, labels: dict[str, dict], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(hexcode, square SVG document) of every icon of one style whose label is known.

    Iconify lists code points for three of the sets; the others have only names, which ``names`` maps.
    """
    package = package_folder(folder, (PACKAGES | MORE_PACKAGES)[style])
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    chars: dict[str, str] = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    by_hex = (
        [(normalise_hex(code), name) for code, name in chars.items()]
        if chars
        else [(names[key], name) for name in icons["icons"] if (key := name.replace("-", "")) in names]
    )
    seen: set[str] = set()
    for code, name in by_hex:
        icon = icons["icons"].get(name)
        if icon is None:  # an alias; those with a transformation of their own are other pictures
            alias = icons.get("aliases", {}).get(name)
            icon = icons["icons"].get(alias["parent"]) if alias and set(alias) <= {"parent", "hidden"} else None
        if icon is None or code not in labels or code in seen:
            continue
        seen.add(code)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        side = max(width, height)
        x = icon.get("left", 0) - (side - width) / 2
        y = icon.get("top", 0) - (side - height) / 2
        yield (
            code,
            (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{x} {y} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
            ),
        )


def icon_names(folder: Path, labels: dict[str, dict]) -> dict[str, str]:
    """Icon name without hyphens -> hexcode, for the sets that list no code points."""
    names: dict[str, str] = {}
    for style in ("twemoji", "flat", "noto"):
        chars = json.loads((package_folder(folder, PACKAGES[style]) / "chars.json").read_text(encoding="utf-8"))
        for code, name in chars.items():
            if normalise_hex(code) in labels:
                names.setdefault(name.replace("-", ""), normalise_hex(code))
    for code, meta in labels.items():
        names.setdefault(re.sub(r"[^a-z0-9]+", "", meta["label"]), code)
    return names


def render(svg: str, size: int, path: Path) -> bool:
    """Draw one SVG on white and write it as PNG; False where the renderer refuses it."""
    import resvg_py

    from ..media.images import open_image

    try:
        data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        log.warning("%s was not drawn: %s", path.name, error)
        return False
    open_image(bytes(data), path.name).save(path)
    return True


def assign_splits(pairs: set[tuple[str, str]], demo: set[str]) -> dict[tuple[str, str], str]:
    """(base hexcode, style) -> split. Independent of the order of ``pairs``.

    A concept gives away at most one style to ``heldout`` and one to ``validation``, and only if three or more show it, so
    every concept that is tested in one style was shown in others.
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
        held, val = rng.random() < HELDOUT_SHARE * len(shown), rng.random() < VALIDATION_SHARE * len(shown)
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


def near_copies(rows: list[tuple[str, str, Path]], secret: list[tuple[str, str, Path]], labels: dict[str, dict]) -> set[Path]:
    """Pictures of ``rows`` that nearly are one of ``secret`` of the same concept; rows are (style, hexcode, path).

    Houses have taken drawings over from one another and from their own earlier sets.
    """
    hidden: dict[str, list[np.ndarray]] = {}
    for _, code, path in secret:
        hidden.setdefault(labels[code]["base"], []).append(thumbnail(path))
    found = set()
    for _, code, path in rows:
        others = hidden.get(labels[code]["base"], [])
        if others and min(np.abs(thumbnail(path) - other).mean() for other in others) < COPY_DISTANCE:
            found.add(path)
    return found


def thumbnail(path: Path, side: int = 32) -> np.ndarray:
    """What a picture looks like from afar: (side, side, 3) in [0, 1]."""
    from PIL import Image

    from ..media.images import open_image

    return np.asarray(open_image(path).resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255


def demo_concepts() -> set[str]:
    """Hexcodes of the concepts that the bundled model is trained on (``concepts.txt``)."""
    lines = CONCEPTS_FILE.read_text(encoding="utf-8").splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def split_rows(splits: dict[tuple[str, str], str]) -> list[str]:
    """The pairs that are not for training, one ``base hexcode,style,split`` a row: the form of ``split.csv``."""
    return [f"{base},{style},{split}" for (base, style), split in sorted(splits.items()) if split != "train"]


def prepare(out: Path, size: int = 128, packages: Path | None = None, workers: int = 2) -> list[Record]:
    """Download, render and caption everything; write ``metadata.jsonl`` and ``images/`` below ``out``.

    Args:
        out: the image folder to make.
        size: side of the square pictures in pixels.
        packages: where the npm packages are kept; default ``out/packages``.
        workers: rendering processes.

    Raises:
        ValueError: the packages give another split than the published one.
    """
    packages = packages or out / "packages"
    download(packages)
    labels = read_labels(packages)
    names = icon_names(packages, labels)
    (out / "images").mkdir(parents=True, exist_ok=True)
    demo = demo_concepts()
    houses = (*STYLES, *MORE_PACKAGES)
    jobs = [(style, code, svg) for style in houses for code, svg in icon_svgs(packages, style, labels, names)]
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
    secret = [row for row in kept if row[0] in STYLES and splits[labels[row[1]]["base"], row[0]] != "train"]
    copies = near_copies([row for row in kept if row[0] in MORE_PACKAGES], secret, labels)
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
    partial = out / "metadata.jsonl.partial"
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    partial.replace(out / "metadata.jsonl")
    log.info("%d pictures in %s", len(records), out)
    return records
