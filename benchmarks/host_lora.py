"""Trains the creature of benchmarks/lora.py with the node Train UniDiffuser LoRA in a fresh ComfyUI, and uses the file there.

    python -m benchmarks.lora draw zorbi/
    python benchmarks/host_lora.py zorbi/ out/node        # out/node/zorbi.safetensors, node.jpg, plot.png
    python -m benchmarks.lora ask zorbi/ node.json --lora out/node/zorbi.safetensors

All inputs of the node are its defaults. node.jpg: the word drawn by the UniDiffuser Sampler (above) and by the host's own
Load LoRA and KSampler (below), eight pictures each; printed is what the graph says of the pictures held back.
"""

# ruff: noqa: E402 (the path of the test helpers comes first)
from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests/host")]
from flow import default_of, is_widget
from fresh_host import fresh_host, version
from host_server import HostServer
from prompts import Graph
from tiny_server import HOW, find_comfyui

from unidiffuser.media.files import replacing
from unidiffuser.media.images import contact_sheet

WORD, NODE, MODEL = "zorbi", "UniDiffuserTrainLora", "emoji"
STEPS, GUIDANCE, SECONDS = 20, 3.0, 3600


def defaults(server: HostServer, node: str) -> dict[str, Any]:
    """What a fresh node in the graph is set to."""
    sections = server.get(f"/object_info/{node}")[node]["input"]
    slots = {**sections.get("required", {}), **sections.get("optional", {})}
    return {name: default_of(spec) for name, spec in slots.items() if is_widget(spec)}


def pictures(server: HostServer, shown: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(server.file(item))).convert("RGB") for item in shown["images"]]


def train(server: HostServer, names: list[str], out: Path) -> None:
    """One run of the training node on pictures of the input folder."""
    graph = Graph(MODEL)
    batch, *others = [graph.add("LoadImage", image=name)() for name in names]
    for other in others:
        batch = graph.add("ImageBatch", image1=batch, image2=other)()
    parts = {"model": graph.model, "clip": graph.clip, "vae": graph.vae, "clip_vision": graph.clip_vision}
    told = {"caption_decoder": graph.decoder, "images": batch, "captions": WORD, "name": WORD}
    node = graph.add(NODE, **defaults(server, NODE) | parts | told)
    plot, sample = (graph.add("PreviewImage", images=node(k))()[0] for k in (3, 4))
    start = time.monotonic()
    shown = server.run(graph.prompt, SECONDS)
    print(f"{NODE}: {time.monotonic() - start:.0f} s by the clock", flush=True)
    pictures(server, shown[plot])[0].save(out / "plot.png")
    pictures(server, shown[sample])[0].save(out / "sample.png")
    file = server.base / "models/loras" / f"{WORD}.safetensors"
    with replacing(out / file.name) as temporary:
        shutil.copy(file, temporary)


def use(server: HostServer, names: list[str], out: Path) -> None:
    """The word drawn in two ways, and what is said of some pictures."""
    server.get("/object_info/LoraLoaderModelOnly")  # so that the host looks at its folder again
    graph, file = Graph(MODEL), f"{WORD}.safetensors"
    strengths = {"strength_model": 1.0, "strength_captions": 1.0}
    ours = graph.add("UniDiffuserLoraLoader", model=graph.model, caption_decoder=graph.decoder, lora_name=file, **strengths)
    path, given = graph.path("text to image", STEPS)(), {"latent_image": graph.empty(batch_size=8), "text": graph.text(WORD)}
    above = graph.show(graph.sampler(path, 0, model=ours(0), image_guidance=GUIDANCE, **given)(0))
    core = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=file, strength_model=1.0)()
    nothing = graph.add("ConditioningZeroOut", conditioning=graph.text(WORD))()
    latent = graph.empty(batch_size=8)
    below = graph.show(graph.ksampler(graph.text(WORD), nothing, latent, model=core, steps=STEPS, cfg=GUIDANCE)())
    said = []
    for name in names:
        img, token = graph.encoded(graph.add("LoadImage", image=name)())
        read = graph.path("image to text", STEPS)()
        out_text = graph.sampler(read, 0, model=ours(0), text_guidance=GUIDANCE, latent_image=img, clip_vision_output=token)(2)
        ways = {"method": "beam", "candidates": 1, "beams": 5, "top_p": 0.8, "temperature": 1.0, "seed": 0}
        words = graph.add("UniDiffuserDecodeCaption", caption_decoder=ours(1), text=out_text, **ways)
        said.append(words()[0])
    shown = server.run(graph.prompt, SECONDS)
    print([text for name in said for text in shown[name]["text"]])
    found = pictures(server, shown[above]) + pictures(server, shown[below])
    contact_sheet(found, ["UniDiffuser Sampler"] * 8 + ["KSampler, Load LoRA"] * 8, 8).save(out / "node.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by `python -m benchmarks.lora draw`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--lora", type=Path, help="use this file instead of training one")
    options = parser.parse_args()
    if (comfyui := find_comfyui()) is None:
        raise SystemExit(HOW)
    options.out.mkdir(parents=True, exist_ok=True)
    with fresh_host(*comfyui) as server:
        print(f"ComfyUI {version(server)}", flush=True)
        names: dict[str, list[str]] = {}
        for part in ("learn", "held-back"):
            names[part] = [f"{part}-{path.name}" for path in sorted((options.folder / part).glob("*.png"))]
            for name in names[part]:
                shutil.copy(options.folder / part / name.removeprefix(f"{part}-"), server.base / "input" / name)
        if options.lora:
            shutil.copy(options.lora, server.base / "models/loras" / f"{WORD}.safetensors")
        else:
            train(server, names["learn"], options.out)
        use(server, names["held-back"], options.out)


if __name__ == "__main__":
    main()
