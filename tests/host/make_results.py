"""Runs every template in a fresh ComfyUI through /prompt and writes the results as a markdown table.

    python tests/host/make_results.py [--out docs/results/host-workflows.md] [--host FOLDER PYTHON]...

Each --host is a ComfyUI and the interpreter that has its requirements; without one, COMFYUI_PATH and COMFYUI_PYTHON.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

from flow import RUN
from fresh_host import forget, fresh_host, version
from host_server import HostServer
from make_workflows import API_FOLDER, ROOT, WORKFLOWS, stem
from PIL import Image
from tiny_server import HOW, find_comfyui

HEAD = """# Every template through the real server

`python tests/host/make_results.py`: fresh ComfyUIs without any checkpoint, on the CPU, with the bundled model; caches are
emptied before each template, so the seconds hold the loading of the model. "Off" are nodes that wait for a checkpoint.
"""


def switched_off(title: str) -> str:
    """The muted and bypassed nodes of a template."""
    nodes = json.loads((ROOT / "workflows" / f"{stem(title)}.json").read_text(encoding="utf-8"))["nodes"]
    kinds = [node["type"] for node in nodes if node["mode"] != RUN]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "-"


def files(server: HostServer, shown: dict[str, dict[str, Any]]) -> str:
    """Names and sizes of the saved files, and how many previews there were."""
    items = [item for output in shown.values() for item in output.get("images", [])]
    saved = [item for item in items if item["type"] == "output"]
    sizes = []
    for item in saved:
        data = server.file(item)
        with Image.open(io.BytesIO(data)) as picture:
            frames = getattr(picture, "n_frames", 1)
            size = f"{picture.width} x {picture.height}" + (f" x {frames}" if frames > 1 else "")
        sizes.append(f"{item['filename']} ({size}, {len(data) / 1024:.1f} kB)")
    return "<br>".join([*sizes, f"{len(items) - len(saved)} previews"])


def captions(prompt: dict[str, Any], shown: dict[str, dict[str, Any]]) -> str:
    kinds = {name: node["class_type"] for name, node in prompt.items() if name in shown}
    saying = ("UniDiffuserCaptionPicture", "UniDiffuserShowPairs", "UniDiffuserDecodeCaption")
    kind = next((kind for kind in saying if kind in kinds.values()), "")
    texts = [text for name in kinds if kinds[name] == kind for text in shown[name]["text"]]
    return "<br>".join(line for text in texts for line in text.splitlines() if line) or "-"


def row(server: HostServer, title: str) -> str:
    prompt = json.loads((API_FOLDER / f"{stem(title)}.json").read_text(encoding="utf-8"))
    forget(server)
    started = time.monotonic()
    try:
        shown = server.run(prompt, 900)
    except RuntimeError as error:
        return f"| {title} | {str(error).splitlines()[0]} | {time.monotonic() - started:.1f} | - | - | - |"
    seconds = time.monotonic() - started
    cells = [title, "ok", f"{seconds:.1f}", switched_off(title), files(server, shown), captions(prompt, shown)]
    return f"| {' | '.join(cells)} |"


def table(comfyui: Path, python: Path) -> str:
    with fresh_host(comfyui, python) as server:
        lines = ["| workflow | end | seconds | off | files | captions |", "|---|---|---|---|---|---|"]
        return "\n".join([f"## ComfyUI {version(server)}", "", *lines, *(row(server, title) for title in WORKFLOWS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/host-workflows.md")
    parser.add_argument("--host", nargs=2, type=Path, action="append", metavar=("FOLDER", "PYTHON"))
    options = parser.parse_args()
    found = find_comfyui()
    hosts = options.host or ([found] if found else [])
    if not hosts:
        raise SystemExit(HOW)
    options.out.write_text("\n\n".join([HEAD.strip(), *(table(*host) for host in hosts)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
