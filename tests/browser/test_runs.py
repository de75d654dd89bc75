"""Runs from the front end: the marker on the path, the same pixels through the API, drafts of captions, pairs, warnings."""

from __future__ import annotations

from typing import Any

from node_page import NodePage
from prompts import Graph

STEPS = 6
WATCH = """() => {
    window.seen = {marker: [], texts: {}};
    const look = () => {
        const marker = document.querySelector('.ud-marker');
        if (marker) seen.marker.push([+marker.getAttribute('cx'), +marker.getAttribute('cy')]);
    };
    const watched = {subtree: true, childList: true, attributes: true, attributeFilter: ['cx']};
    new MutationObserver(look).observe(document.body, watched);
    window.comfyAPI.api.api.addEventListener('progress_text', ({detail}) => {
        (seen.texts[detail.nodeId] ??= []).push(detail.text);
    });
}"""

SAME_PIXELS = """async (lists) => {
    const pixels = async ({filename, subfolder, type}) => {
        const picture = await createImageBitmap(
            await (await fetch('/view?' + new URLSearchParams({filename, subfolder, type}))).blob(),
        );
        const pen = new OffscreenCanvas(picture.width, picture.height).getContext('2d');
        pen.drawImage(picture, 0, 0);
        return [...pen.getImageData(0, 0, picture.width, picture.height).data].join();
    };
    const [one, other] = await Promise.all(lists.map((list) => Promise.all(list.map(pixels))));
    return one.length === other.length && one.every((text, k) => text === other[k]);
}"""


def build(page: NodePage, points: str) -> dict[str, Any]:
    """Loader, a drawn path, sampler, decoders and Show Pairs; returns the ids of the nodes."""
    ids = {
        "loader": page.add("UniDiffuserLoader", (20, 700), model_name="tiny.safetensors").id,
        "latent": page.add("EmptyLatentImage", (20, 860), width=128, height=128, batch_size=2).id,
    }
    path = page.add(at=(20, 90))
    path.preset("drawn")
    path.set("task.points", points)
    path.set("steps", STEPS)
    ids["path"] = path.id
    ids["sampler"] = page.add("UniDiffuserSampler", (400, 90), seed=7, image_guidance=2.0, text_guidance=2.0).id
    ids["image"] = page.add("VAEDecode", (400, 600)).id
    ids["caption"] = page.add("UniDiffuserDecodeCaption", (400, 680)).id
    ids["pairs"] = page.add("UniDiffuserShowPairs", (760, 90), save=False).id
    wires = (
        ("loader", 0, "sampler", "model"),
        ("path", 0, "sampler", "path"),
        ("latent", 0, "sampler", "latent_image"),
        ("loader", 4, "sampler", "caption_decoder"),
        ("sampler", 0, "image", "samples"),
        ("loader", 2, "image", "vae"),
        ("loader", 4, "caption", "caption_decoder"),
        ("sampler", 2, "caption", "text"),
        ("image", 0, "pairs", "images"),
        ("caption", 0, "pairs", "captions"),
    )
    page.wire_all(ids, wires)
    return ids


def test_a_drawn_path_runs_as_the_same_points_through_the_api(page: NodePage) -> None:
    server = page.front_end.server
    ids = build(page, "1000,1000 0,0")
    path = page.known(ids["path"])
    path.drag((500, 500), (700, 200))
    points = path.values()["points"]
    assert len(points.split()) == 3
    page.page.evaluate(WATCH)
    before = set(server.get("/history"))
    assert page.front_end.run() == "success"
    new = [entry for name, entry in server.get("/history").items() if name not in before]
    ran = next(entry for entry in new if str(ids["pairs"]) in entry["outputs"])

    seen = page.page.evaluate("() => seen")
    assert len(set(map(tuple, seen["marker"]))) >= 2
    assert page.page.locator(".ud-marker").count() == 0  # gone after the run

    graph = Graph()
    again = graph.add("UniDiffuserNoisePath", task="drawn", steps=STEPS, spacing="uniform", **{"task.points": points})()
    out = graph.sampler(again, seed=7, latent_image=graph.empty(batch_size=2))
    preview = graph.show(out(0))
    by_api = server.run(graph.prompt)[preview]["images"]
    shown = ran["outputs"][str(ids["pairs"])]
    assert len(by_api) == 2
    assert page.page.evaluate(SAME_PIXELS, [shown["images"], by_api])

    captions = shown["unidiffuser_captions"]
    drafts = next(texts for node, texts in seen["texts"].items() if str(node) == str(ids["sampler"]))
    below = [text.split("\n\n")[-1] for text in drafts]  # the last part, below warnings
    drafts = [text for text in below if not text.startswith("\u26a0")]
    assert [line.rstrip() for line in drafts[-1].splitlines()] == captions
    assert page.renderer == "classic" or "\n".join(captions) in page.known(ids["sampler"]).texts()  # a line each
    assert all(len(draft.split("\n")) == 2 for draft in drafts)

    gallery = page.page.locator(".ud-pairs")
    assert gallery.locator("figcaption").all_inner_texts() == captions
    assert gallery.locator("img").evaluate_all("(all) => all.every((image) => image.complete && image.naturalWidth === 128)")


def test_a_warning_stays_after_the_run_until_it_no_longer_holds(page: NodePage) -> None:
    # more tokens than the tiny model reads
    nodes = page.draw_a_text("tiny.safetensors", 128, "qwertyuiop", seed=1, steps=2, denoise=0.05)
    prompt, sampler = nodes["text"], nodes["sampler"]
    assert page.front_end.run() == "success"
    warning = sampler.host_text()
    assert warning.startswith("\u26a0 Cut to the text encoder's limit")
    assert page.page.get_by_text("Cut to the text encoder's limit").first.is_visible()

    before = len(page.front_end.server.get("/history"))
    page.page.get_by_test_id("queue-button").click()  # runs no node again, so the warning still holds
    assert page.until(lambda: len(page.front_end.server.get("/history")) > before)
    assert sampler.host_text() == warning

    prompt.set("text", "q")
    assert page.front_end.run() == "success"
    assert sampler.host_text() == ""
