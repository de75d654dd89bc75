"""Runs every template in a fresh ComfyUI and draws its picture for the Templates dialog: inputs and outputs.

    python tests/host/make_pictures.py

writes workflows/<name>.jpg. Run it again when the bundled model has changed. The upper left corner stays empty, because the
dialog draws a badge there.
"""

# ruff: noqa: E402 (the path of the test helpers comes first)
from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from fresh_host import forget, fresh_host
from host_server import HostServer
from make_workflows import API_FOLDER, ROOT, WORKFLOWS, stem
from PIL import Image, ImageDraw, ImageFont

SIDE, GIVEN, ARROW, FONT, INK = 512, 128, 28, 26, "#202020"
BADGE = 64  # height of the strip that stays empty for the badge
DESCRIBED = ("Image to text", "Partial caption rewriting", "Caption then Stable Diffusion 1.5")
SAVED = ("SaveImage", "UniDiffuserShowPairs", "PreviewImage")


@dataclass(frozen=True)
class Shown:
    """What a template shows: its input images, its output images (a list per node), and its texts."""

    given: list[Image.Image]
    made: list[list[Image.Image]]
    texts: list[str]


def results(server: HostServer, title: str) -> Shown:
    prompt: dict[str, Any] = json.loads((API_FOLDER / f"{stem(title)}.json").read_text(encoding="utf-8"))
    forget(server)
    shown = server.run(prompt, 900)

    def outputs(kind: str) -> list[dict[str, Any]]:
        return [shown[name] for name, node in prompt.items() if node["class_type"] == kind and name in shown]

    def pictures(kind: str) -> list[list[Image.Image]]:
        return [[Image.open(io.BytesIO(server.file(item))) for item in output["images"]] for output in outputs(kind)]

    given = [picture for group in pictures("UniDiffuserExamplePicture") for picture in group]
    made = next((found for found in map(pictures, SAVED) if found), [])
    captions = outputs("UniDiffuserCaptionPicture") or outputs("UniDiffuserShowPairs") or outputs("UniDiffuserDecodeCaption")
    texts = [line for output in captions for text in output["text"] for line in text.splitlines() if line]
    before = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "UniDiffuserRewriteWords"]
    texts = [f"{text}  >  {line}" for text in before for line in texts] or texts
    if title in DESCRIBED:  # the image that is described is the one that is shown
        made = []
    return Shown(given, made, texts)


def written(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, size: int) -> None:
    """Draw a centred line of text, in a smaller font if it does not fit."""
    while size > 8 and draw.textlength(text, ImageFont.load_default(size)) > width - 8:
        size -= 1
    draw.text((left + width / 2, top + size / 2), text, fill=INK, font=ImageFont.load_default(size), anchor="mm")


def sheet(shown: Shown) -> Image.Image:
    """A square picture: inputs at the left of outputs, captions below their images or below all."""
    rows = shown.made if len(shown.made) > 1 else [group[k : k + 4] for group in shown.made for k in range(0, len(group), 4)]
    if len(rows) == 1 and len(rows[0]) == 4:
        rows = [rows[0][:2], rows[0][2:]]
    named = bool(rows) and len(shown.texts) == sum(map(len, rows))
    below = [] if named else shown.texts
    line = FONT + 8
    caption = line if named else 0
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    edge = 0
    if len(shown.given) == 1 and rows:
        edge, middle = GIVEN + ARROW, SIDE // 2
        canvas.paste(shown.given[0].convert("RGB").resize((GIVEN, GIVEN)), (4, middle - GIVEN // 2))
        draw.polygon([(edge - 18, middle - 10), (edge - 18, middle + 10), (edge - 6, middle)], fill="#a0a0a0")
    rows = rows or [shown.given]
    across = max(map(len, rows))
    room = SIDE - BADGE - len(below) * line - 8
    side = min((SIDE - edge) // across, room // len(rows) - caption)
    upper = BADGE + (room - len(rows) * (side + caption)) // 2 + 4
    texts = iter(shown.texts)
    for y, row in enumerate(rows):
        left, top = edge + (SIDE - edge - len(row) * side) // 2, upper + y * (side + caption)
        for x, picture in enumerate(row):
            canvas.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left + x * side, top))
            if named:
                written(draw, next(texts), left + x * side, top + side, side, FONT if across < 4 else FONT * 2 // 3)
    for k, text in enumerate(below):
        written(draw, text, 0, SIDE - (len(below) - k) * line, SIDE, FONT)
    return canvas


def main() -> None:
    with fresh_host() as server:
        for title in WORKFLOWS:
            sheet(results(server, title)).save(ROOT / "workflows" / f"{stem(title)}.jpg", quality=88)


if __name__ == "__main__":
    main()
