"""Opens every template and blueprint in the host's front end, presses Run, and takes screenshots.

    python tests/host/make_screenshots.py [--out out/screenshots] [--docs] [title ...]

writes <title>, opened.png, <title>.png and report.md: how each run ended, nodes that overlap, the console's errors. With --docs
also the pictures of the help pages (web/docs) and of docs/screenshots; with --previews the host shows what it samples.
"""

# ruff: noqa: E402 (the path of the test helpers comes first)
from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from flow import RUN
from fresh_host import fresh_host, version
from front_end import FrontEnd, front_end, overlaps
from host_server import HostServer
from make_workflows import ROOT
from templates import BLUEPRINTS, HELP_FLOWS, NEW_SUBJECT, WORKFLOWS, stem

from unidiffuser.emoji.studies.lora import draw

logger = logging.getLogger("make_screenshots")
TRAINING = "Train a LoRA"
SWITCHED_ON = ", all on"  # a template whose second half needs a checkpoint, with that half enabled
OURS = re.compile("unidiffuser", re.IGNORECASE)
BLUEPRINT_PICTURE = "fox"
DOCS = ["Image to text", "Joint pairs", "Interpolation", "Noise path exploration"]
HELP: dict[str, dict[str, tuple[str, ...]]] = {  # by workflow and help page: the nodes in its picture
    "Text to image": {"Loader": ("UniDiffuserLoader", "CLIPTextEncode", "KSampler", "VAEDecode", "SaveImage")},
    "Image to text": {
        "ExamplePicture": ("UniDiffuserExamplePicture", "UniDiffuserCaptionPicture"),
        "CaptionPicture": ("UniDiffuserCaptionPicture", "UniDiffuserShowPairs"),
    },
    "Caption step by step": {
        "EncodePicture": ("UniDiffuserEncodePicture", "UniDiffuserNoisePath", "UniDiffuserSampler", "UniDiffuserDecodeCaption"),
        "DecodeCaption": ("UniDiffuserSampler", "UniDiffuserDecodeCaption"),
    },
    "Prompt helper": {
        "PromptHelper": ("UniDiffuserPromptHelper", "UniDiffuserTextToPair"),
        "TextToPair": ("UniDiffuserTextToPair", "UniDiffuserShowPairs"),
    },
    "Joint pairs": {
        "Sampler": ("UniDiffuserNoisePath", "UniDiffuserSampler", "UniDiffuserShowPairs"),
        "ShowPairs": ("UniDiffuserDecodeCaption", "UniDiffuserShowPairs"),
    },
    "Noise path exploration": {"NoisePath": ("UniDiffuserNoisePath", "UniDiffuserSampler", "UniDiffuserShowPairs")},
    "Partial caption rewriting": {
        "RewriteWords": ("UniDiffuserRewriteWords", "UniDiffuserNoisePath", "UniDiffuserSampler", "UniDiffuserDecodeCaption")
    },
    "Interpolation": {"Interpolate": ("UniDiffuserExamplePicture", "UniDiffuserInterpolate", "UniDiffuserShowPairs")},
    "Gibbs chain": {"GibbsChain": ("UniDiffuserGibbsChain", "UniDiffuserShowPairs")},
    "Invert": {"Invert": ("UniDiffuserInvert", "UniDiffuserSampler", "PreviewImage")},
    "Score captions": {"ScoreCaptions": ("UniDiffuserScoreCaptions", "PreviewAny")},
    TRAINING: {"TrainLora": ("UniDiffuserTrainLora", "PreviewImage")},
    "Use a LoRA": {"LoraLoader": ("UniDiffuserLoraLoader", "UniDiffuserSampler", "PreviewImage")},
}


def look(page: FrontEnd, title: str, opening: Callable[[], None], folder: Path) -> str:
    """Open and run a workflow and take screenshots; returns a line of the report."""
    started = time.monotonic()
    opening()
    page.fit()
    page.screenshot(folder / f"{title}, opened.png")
    missing = page.page.get_by_text(re.compile("missing", re.IGNORECASE)).all_inner_texts()
    messages = "; ".join(missing).replace("\n", " ")
    page.page.keyboard.press("Escape")
    end = page.run()
    page.fit()
    page.screenshot(folder / f"{title}.png")
    covered = overlaps(page.nodes())
    cells = [
        title,
        end,
        f"{time.monotonic() - started:.0f}",
        "; ".join(covered) or "none",
        messages or "-",
    ]
    logger.info(" | ".join(cells))
    return f"| {' | '.join(cells)} | {console(page.take_messages())} |"


def console(messages: list[str]) -> str:
    """Counted messages; those about this pack are marked."""
    plain = [re.sub(r"rand=[\d.]+|http://127.0.0.1:\d+|\s+", " ", message)[:300] for message in messages]
    counted = {message: plain.count(message) for message in plain}
    return "<br>".join(f"{'**OURS** ' if OURS.search(m) else ''}{m} (x{n})" for m, n in counted.items()) or "none"


def crop(page: FrontEnd, kinds: tuple[str, ...], target: Path, width: int) -> None:
    """Save a JPEG of the nodes of some types, at most `width` pixels wide."""
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "crop.png", kinds)
        with Image.open(Path(folder) / "crop.png") as picture:
            picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.convert("RGB").save(target, quality=80, optimize=True)


def keep(page: FrontEnd, title: str) -> None:
    """Save the documentation's pictures of a workflow."""
    for name, kinds in HELP.get(title, {}).items():
        crop(page, kinds, ROOT / f"web/docs/UniDiffuser{name}.jpg", 900)
    if title in DOCS:
        name = title.lower().replace(" ", "-")
        crop(page, tuple({box["type"] for box in page.nodes()}), ROOT / f"docs/screenshots/{name}.jpg", 1500)


def opening(page: FrontEnd, title: str, info: dict[str, Any]) -> Callable[[], None]:
    if title in BLUEPRINTS:
        return partial(page.open_blueprint, title, BLUEPRINT_PICTURE)
    if title in HELP_FLOWS:
        return partial(page.open_workflow, HELP_FLOWS[title](info, title).front_end())
    if title.endswith(SWITCHED_ON):
        base = title.removesuffix(SWITCHED_ON)
        form = WORKFLOWS[base](info, base).front_end()
        for node in form["nodes"]:
            node["mode"] = RUN
        return partial(page.open_workflow, form)
    return partial(page.open_template, stem(title), title)


def bring(server: HostServer, names: list[str]) -> None:
    """Put images of an unknown subject into the input folder."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for name in names:
            shutil.copy(Path(folder) / "learn" / name, server.base / "input" / name)


def photograph(server: HostServer, wanted: list[str], options: argparse.Namespace) -> None:
    """Take the screenshots and write the report."""
    with front_end(server) as page:
        folder, info = options.out / version(server), server.get("/object_info")
        if TRAINING in wanted:
            bring(server, NEW_SUBJECT)
        lines = [f"# Every template in the front end of ComfyUI {version(server)}", ""]
        lines += [f"`python tests/host/make_screenshots.py`. Console at start: {console(page.take_messages())}", ""]
        lines += ["| workflow | end | seconds | overlaps | missing | console |", "|---|---|---|---|---|---|"]
        for title in wanted:
            lines.append(look(page, title, opening(page, title, info), folder))
            if title == TRAINING:
                page.refresh()
                info = server.get("/object_info")  # lists the new file for the next workflow
            if options.docs:
                keep(page, title)
            (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/screenshots"))
    parser.add_argument("--docs", action="store_true", help="renew the pictures in web/docs and docs/screenshots")
    parser.add_argument("--lora", type=Path, help="a file that the flow Train a LoRA has written, for Use a LoRA alone")
    parser.add_argument("--previews", action="store_true", help="with the host's previews of the samplers")
    parser.add_argument("titles", nargs="*", help="some templates or blueprints; all without")
    options = parser.parse_args()
    waiting = [title + SWITCHED_ON for title in WORKFLOWS if "Stable Diffusion" in title]
    wanted = options.titles or [*WORKFLOWS, *waiting, *BLUEPRINTS, *(HELP_FLOWS if options.docs else [])]
    with fresh_host(*(["--preview-method", "auto"] if options.previews else [])) as server:
        if options.lora:
            shutil.copy(options.lora, server.base / "models/loras/zorbi.safetensors")
        photograph(server, wanted, options)


if __name__ == "__main__":
    main()
