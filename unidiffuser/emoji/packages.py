"""The npm packages behind the demonstration data: emoji pictures as SVG, and their English labels.

The SVG sets are republished by Iconify (noto: Apache-2.0, twemoji: CC BY 4.0, fluent and fluent flat: MIT; noto-v1 and fxemoji:
Apache-2.0, EmojiOne 2: CC BY 4.0); the labels are those of emojibase-data (MIT).
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..media.images import open_image

log = logging.getLogger(__name__)

PACKAGES = {  # style word used in captions -> npm package
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
}
MORE_PACKAGES = {  # other emoji sets, which only encoders and judge are trained on
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
LABELS_PACKAGE = "emojibase-data@17.0.0"
STYLES = tuple(PACKAGES)


def download(folder: Path) -> None:
    """Fetch the packages with the npm client and unpack them below `folder`; those already there are skipped."""
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
    """Code points without variation selectors and leading zeros, which the two sources write differently."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F").lstrip("0")


def read_labels(folder: Path) -> dict[str, dict]:
    """Label, tags, group, skin tone and base hexcode of each hexcode, from emojibase."""
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

    Iconify lists code points for three of the sets; the others have only names, which `names` maps to hexcodes.
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
    """Render one SVG on white and write it as PNG; False if the renderer refuses it."""
    import resvg_py

    try:
        data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        log.warning("%s was not rendered: %s", path.name, error)
        return False
    open_image(bytes(data), path.name).save(path)
    return True
