"""Every template, in its API form, through the real server."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from flow import LEAST_SCALE, PREVIEWS
from host_server import HostServer, InvalidPrompt
from make_workflows import API_FOLDER, MODEL, ROOT, WORKFLOWS, stem
from PIL import Image
from templates import BLUEPRINTS

BUNDLED = ROOT / "unidiffuser/assets" / f"{MODEL}.safetensors"
LARGE_ONLY = {"Hand-over to Stable Diffusion 1.5"}  # runs, but only the 1 B model's latents mean anything to SD 1.5


def api(title: str) -> dict[str, Any]:
    return json.loads((API_FOLDER / f"{stem(title)}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", WORKFLOWS)
def test_template_runs(server: HostServer, title: str) -> None:
    prompt = api(title)
    for node in prompt.values():
        if node["class_type"] == "UniDiffuserLoader" and not BUNDLED.is_file():
            node["inputs"]["model_name"] = "tiny.safetensors"
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 3
    shown = server.run(prompt)
    kind = "temp" if title == "Draw as you type" else "output"  # it shows its image and saves none
    images = [image for output in shown.values() for image in output.get("images", []) if image["type"] == kind]
    texts = [text for output in shown.values() for text in output.get("text", [])]
    assert images or texts
    for image in images:
        assert server.file(image)[:4] in (b"\x89PNG", b"RIFF")


@pytest.mark.parametrize("title", WORKFLOWS)
def test_both_forms_hold_the_same_nodes(title: str) -> None:
    flow = json.loads((ROOT / "workflows" / f"{stem(title)}.json").read_text(encoding="utf-8"))
    running = {str(node["id"]): node["type"] for node in flow["nodes"] if node["mode"] == 0 and node["type"] != "MarkdownNote"}
    assert running == {name: node["class_type"] for name, node in api(title).items()}
    for node in flow["nodes"]:
        ours = node["type"].startswith("UniDiffuser")
        assert node["type"] == "MarkdownNote" or node["properties"]["cnr_id"] == ("unidiffuser" if ours else "comfy-core")
    loader = next(node for node in flow["nodes"] if node["type"] == "UniDiffuserLoader")
    assert all({"name", "url", "directory"} <= set(model) for model in loader["properties"]["models"])


@pytest.mark.parametrize("title", WORKFLOWS)
def test_the_preview_of_a_sampler_covers_no_node(title: str) -> None:
    nodes = json.loads((ROOT / "workflows" / f"{stem(title)}.json").read_text(encoding="utf-8"))["nodes"]
    for node in nodes:
        if node["type"] in PREVIEWS:
            left, top = node["pos"]
            assert not [other["type"] for other in nodes if other["pos"][0] == left and other["pos"][1] > top]


def test_the_server_offers_the_templates_texts_and_help(server: HostServer) -> None:
    assert set(map(stem, WORKFLOWS)) == set(server.get("/workflow_templates")["UniDiffuser"])
    for title in WORKFLOWS:  # one more folder of the pack, called "examples", would answer in the place of this one
        assert json.loads(server.request(f"/api/workflow_templates/UniDiffuser/{stem(title)}.json"))["nodes"]
        assert server.request(f"/api/workflow_templates/UniDiffuser/{stem(title)}.jpg").startswith(b"\xff\xd8")
    texts = server.get("/i18n")
    assert {"UniDiffuserSampler"} <= set(texts["en"]["nodeDefs"]) & set(texts["zh"]["nodeDefs"])
    assert b"noise path" in server.request("/extensions/UniDiffuser/docs/UniDiffuserSampler.md")
    assert "噪声路径" in server.request("/extensions/UniDiffuser/docs/UniDiffuserSampler/zh.md").decode()


def test_folders_hold_templates_only() -> None:
    for folder, suffix in ((ROOT / "workflows", ".json"), (ROOT / "workflows", ".jpg"), (API_FOLDER, ".json")):
        assert {path.stem for path in folder.glob(f"*{suffix}")} == set(map(stem, WORKFLOWS))


@pytest.mark.parametrize("title", WORKFLOWS)
def test_links_open_a_template_that_can_be_read(title: str) -> None:
    assert re.fullmatch("[a-zA-Z0-9_.-]+", stem(title))  # what the front end accepts in ?template=
    flow = json.loads((ROOT / "workflows" / f"{stem(title)}.json").read_text(encoding="utf-8"))
    assert flow["extra"]["ds"]["scale"] >= LEAST_SCALE  # shows everything in a small window
    note = next(node for node in flow["nodes"] if node["type"] == "MarkdownNote")
    assert note["title"] == title
    assert "**Try next:**" in note["widgets_values"][0]


@pytest.mark.parametrize("title", BLUEPRINTS)
def test_blueprints_show_their_widgets(title: str) -> None:
    form = json.loads((ROOT / "subgraphs" / f"{title}.json").read_text(encoding="utf-8"))
    holder, inside = form["nodes"][0], form["definitions"]["subgraphs"][0]
    assert [socket["name"] for socket in holder["inputs"]] == [socket["name"] for socket in inside["inputs"]]
    assert all(socket["linkIds"] for socket in inside["inputs"] + inside["outputs"])
    nodes = {str(node["id"]): node for node in inside["nodes"]}
    shown = holder["properties"]["proxyWidgets"]
    assert len(shown) == sum("widget" in socket for socket in holder["inputs"]) >= 3
    assert all(name in {socket["name"] for socket in nodes[node]["inputs"]} for node, name in shown)


def test_an_example_image_may_be_a_file_of_the_input_folder(server: HostServer) -> None:
    def shown(picture: str) -> bytes:  # pixels, as the files contain their prompts too
        node = {"class_type": "UniDiffuserExamplePicture", "inputs": {"picture": picture}}
        preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        file = server.file(server.run({"1": node, "2": preview})["2"]["images"][0])
        return Image.open(io.BytesIO(file)).tobytes()

    (server.base / "input/own.png").write_bytes((ROOT / "nodes/pictures/lion.png").read_bytes())
    assert shown("own.png") == shown("lion") != shown("fox")
    for outside in ("missing.png", "../server.log", str(ROOT / "nodes/pictures/lion.png")):
        with pytest.raises(InvalidPrompt, match="input folder"):
            shown(outside)
