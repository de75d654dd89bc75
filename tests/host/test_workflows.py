"""Every template, in its API form, through the real server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from host_server import HostServer
from make_workflows import API_FOLDER, MODEL, ROOT, WORKFLOWS

BUNDLED = ROOT / "unidiffuser/assets" / f"{MODEL}.safetensors"
LARGE_ONLY = {"Hand-over to Stable Diffusion 1.5"}  # runs, but only the 1 B model's latents mean anything to SD 1.5


def api(title: str) -> dict[str, Any]:
    return json.loads((API_FOLDER / f"{title}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", WORKFLOWS)
def test_template_runs(server: HostServer, title: str) -> None:
    prompt = api(title)
    shutil.copy(ROOT / "nodes/pictures/sunflower.png", server.base / "input/example.png")
    for node in prompt.values():
        if node["class_type"] == "UniDiffuserLoader" and not BUNDLED.is_file():
            node["inputs"]["model_name"] = "tiny.safetensors"
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 3
    shown = server.run(prompt)
    images = [image for output in shown.values() for image in output.get("images", []) if image["type"] == "output"]
    texts = [text for output in shown.values() for text in output.get("text", [])]
    assert images or texts
    for image in images:
        assert server.file(image)[:4] in (b"\x89PNG", b"RIFF")


@pytest.mark.parametrize("title", WORKFLOWS)
def test_both_forms_hold_the_same_nodes(title: str) -> None:
    flow = json.loads((ROOT / "workflows" / f"{title}.json").read_text(encoding="utf-8"))
    running = {str(node["id"]): node["type"] for node in flow["nodes"] if node["mode"] == 0 and node["type"] != "MarkdownNote"}
    assert running == {name: node["class_type"] for name, node in api(title).items()}
    for node in flow["nodes"]:
        ours = node["type"].startswith("UniDiffuser")
        assert node["type"] == "MarkdownNote" or node["properties"]["cnr_id"] == ("unidiffuser" if ours else "comfy-core")
    loader = next(node for node in flow["nodes"] if node["type"] == "UniDiffuserLoader")
    assert all({"name", "url", "directory"} <= set(model) for model in loader["properties"]["models"])


def test_the_server_offers_the_templates_texts_and_help(server: HostServer) -> None:
    assert set(WORKFLOWS) <= set(server.get("/workflow_templates")["UniDiffuser"])
    texts = server.get("/i18n")
    assert {"UniDiffuserSampler"} <= set(texts["en"]["nodeDefs"]) & set(texts["zh"]["nodeDefs"])
    assert b"noise path" in server.request("/extensions/UniDiffuser/docs/UniDiffuserSampler.md")
    assert "噪声路径" in server.request("/extensions/UniDiffuser/docs/UniDiffuserSampler/zh.md").decode()


def test_folders_hold_templates_only() -> None:
    stems = {path.stem for path in Path(ROOT / "workflows").glob("*.json")}
    assert stems == set(WORKFLOWS)
