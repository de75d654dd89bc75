"""Writes the templates and blueprints, in the front end's format and the API's, and the English texts of the nodes.

    python tests/host/make_workflows.py [http://127.0.0.1:8188]

reads the nodes' inputs from a ComfyUI with this pack (without an address, one is started) and rewrites workflows/*.json,
subgraphs/*.json, tests/host/workflows/*.json and locales/en/nodeDefs.json.
"""

# ruff: noqa: E402 (the path of the test helpers comes first)
from __future__ import annotations

import json
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
from blueprint import blueprint
from fresh_host import fresh_host
from locale_texts import english_texts
from templates import BLUEPRINTS, MODEL, WITHOUT_IMAGE, WORKFLOWS, Parts, stem

__all__ = ["API_FOLDER", "MODEL", "ROOT", "WORKFLOWS", "stem"]
API_FOLDER = Path(__file__).with_name("workflows")


def object_info(address: str | None) -> dict[str, Any]:
    """The host's /object_info."""
    if address:
        with urllib.request.urlopen(f"{address}/object_info") as answer:
            return json.load(answer)
    with fresh_host() as server:
        return server.get("/object_info")


def write(path: Path, form: dict[str, Any], indent: int = 1) -> None:
    path.write_text(json.dumps(form, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main(address: str | None = None) -> None:
    info = object_info(address)
    API_FOLDER.mkdir(exist_ok=True)
    for title, build in WORKFLOWS.items():
        flow = build(info, title)
        write(ROOT / "workflows" / f"{stem(title)}.json", flow.front_end())
        write(API_FOLDER / f"{stem(title)}.json", flow.api())
    for title, ready in BLUEPRINTS.items():
        parts = Parts(info, title)
        takes_image = title not in WITHOUT_IMAGE
        build = partial(ready, parts) if takes_image else lambda _, ready=ready, parts=parts: ready(parts)
        write(ROOT / "subgraphs" / f"{title}.json", blueprint(parts.flow, build, takes_image))
    write(ROOT / "locales/en/nodeDefs.json", english_texts(info), indent=2)


if __name__ == "__main__":
    main(*sys.argv[1:2])
