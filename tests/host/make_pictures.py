"""Runs every template in a ComfyUI and keeps what it shows: the pictures of the templates and of the help pages.

    python tests/host/make_pictures.py [--model emoji]

writes workflows/<title>.jpg and the pictures in web/docs. Run it again when the bundled model has changed.
"""

# ruff: noqa: E402 (the path of the test helpers comes first)
from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from conftest import find_comfyui
from host_server import HostServer
from make_workflows import API_FOLDER, ROOT, WORKFLOWS
from PIL import Image, ImageDraw, ImageFont

SIDE, TEXT = 128, 18
HELP = {"Joint pairs": "joint", "Interpolation": "interpolate", "Gibbs chain": "gibbs"}


def results(server: HostServer, title: str, model: str) -> tuple[list[Image.Image], list[str]]:
    """(pictures, texts) that a template shows: what it makes, or else what it begins with."""
    prompt: dict[str, Any] = json.loads((API_FOLDER / f"{title}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if "model_name" in node["inputs"]:
            node["inputs"]["model_name"] = model
    shown = server.run(prompt, 900)

    def pictures(kind: str) -> list[Image.Image]:
        outputs = [shown[name] for name, node in prompt.items() if node["class_type"] == kind and name in shown]
        return [Image.open(io.BytesIO(server.file(item))) for output in outputs for item in output["images"]]

    texts = [
        line
        for name, node in prompt.items()
        if node["class_type"] == "PreviewAny" and name in shown
        for text in shown[name]["text"]
        for line in text.splitlines()
    ]
    return pictures("SaveImage") or pictures("PreviewImage") or pictures("UniDiffuserExamplePicture"), texts


def sheet(pictures: list[Image.Image], texts: list[str]) -> Image.Image:
    """Pictures in rows with their texts below."""
    columns = min(4, max(1, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (max(columns * SIDE, 2 * SIDE), rows * SIDE + len(texts) * TEXT + (8 if texts else 0)), "white")
    for k, picture in enumerate(pictures):
        canvas.paste(picture.convert("RGB"), (k % columns * SIDE, k // columns * SIDE))
    draw = ImageDraw.Draw(canvas)
    for k, text in enumerate(texts):
        draw.text((6, rows * SIDE + 4 + k * TEXT), text, fill="#202020", font=ImageFont.load_default(13))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="a name of Load UniDiffuser, or a checkpoint file")
    model = parser.parse_args().model
    found = find_comfyui()
    if found is None:
        raise SystemExit("No ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON.")
    with tempfile.TemporaryDirectory() as folder:
        if Path(model).is_file():
            target = Path(folder) / "models/unidiffuser" / Path(model).name
            target.parent.mkdir(parents=True)
            target.symlink_to(Path(model).resolve())
            model = target.name
        server = HostServer(*found, Path(folder))
        try:
            for title in WORKFLOWS:
                picture = sheet(*results(server, title, model))
                picture.save(ROOT / "workflows" / f"{title}.jpg", quality=90)
                if title in HELP:
                    picture.save(ROOT / "web/docs" / f"{HELP[title]}.jpg", quality=90)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
