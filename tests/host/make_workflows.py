"""The workflow templates, written once here and turned into what the host's front end opens and what its API takes.

    python tests/host/make_workflows.py http://127.0.0.1:8188

asks a ComfyUI with this pack for the nodes' inputs and rewrites workflows/*.json, subgraphs/*.json and
tests/host/workflows/*.json.
"""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
API_FOLDER = Path(__file__).with_name("workflows")
VERSION = "0.1.0"
MODEL = "emoji"
LARGE_MODEL = {
    "name": "uvit_v1.pth",
    "url": "https://huggingface.co/thu-ml/unidiffuser-v1/resolve/main/uvit_v1.pth",
    "directory": "unidiffuser",
}
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
}
RUN, MUTED, BYPASSED = 0, 2, 4
NOTE = "For the published 1 B model (512 x 512), see the help of **Load UniDiffuser**, choose its file and set sizes to 512."
Info = dict[str, Any]


class Out:
    """Output `slot` of a node."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot


class Node:
    def __init__(self, flow: Flow, number: int, kind: str, at: tuple[int, int], inputs: dict[str, Any], mode: int, title: str):
        self.flow, self.number, self.kind, self.at, self.inputs, self.mode, self.title = (
            flow,
            number,
            kind,
            at,
            inputs,
            mode,
            title,
        )

    def __getitem__(self, slot: int) -> Out:
        return Out(self, slot)


class Flow:
    """A workflow under construction; columns and rows place the nodes."""

    def __init__(self, info: Info, note: str):
        self.info, self.nodes, self.note = info, [], note
        self.heights: dict[float, int] = {}

    def add(self, kind: str, column: float, mode: int = RUN, title: str = "", **inputs: Any) -> Node:
        y = self.heights.get(column, 0)
        node = Node(self, len(self.nodes) + 1, kind, (int(column * 380), y), inputs, mode, title)
        self.heights[column] = y + self.size(node)[1] + 60
        self.nodes.append(node)
        return node

    def slots(self, kind: str) -> dict[str, list[Any]]:
        """Inputs of a node in the front end's order."""
        wanted = self.info[kind]["input"]
        return {**wanted.get("required", {}), **wanted.get("optional", {})}

    def size(self, node: Node) -> tuple[int, int]:
        picture = {
            "PreviewImage": 240,
            "SaveImage": 240,
            "UniDiffuserNoisePath": 240,
            "UniDiffuserExamplePicture": 170,
            "LoadImage": 240,
            "UniDiffuserGibbsChain": 170,
            "PreviewAny": 60,
            "CLIPTextEncode": 60,
        }.get(node.kind, 0)
        slots, outputs = self.slots(node.kind), len(self.info[node.kind]["output"])
        widgets = sum(map(is_widget, slots.values()))
        rows = max(len(slots) - widgets, outputs) + widgets + sum("." in name for name in node.inputs)
        return 330, 60 + 26 * rows + picture

    # The front end's form

    def front_end(self) -> dict[str, Any]:
        links: list[list[Any]] = []
        nodes = [self._node(node, links) for node in self.nodes]
        for link in links:
            output = nodes[link[1] - 1]["outputs"][link[2]]
            output["links"] = [*(output["links"] or []), link[0]]
        note = {
            "id": len(nodes) + 1,
            "type": "MarkdownNote",
            "pos": [-380, 0],
            "size": [330, 260],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [f"{self.note}\n\n{NOTE}"],
        }
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.note)),
            "revision": 0,
            "last_node_id": len(nodes) + 1,
            "last_link_id": len(links),
            "nodes": [*nodes, note],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [460, 80]}},
            "version": 0.4,
        }

    def _node(self, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        info = self.info[node.kind]
        inputs, widgets = [], []
        for name, spec in self.slots(node.kind).items():
            given = node.inputs.get(name)
            if isinstance(given, Out):
                kind = self.info[given.node.kind]["output"][given.slot]
                links.append([len(links) + 1, given.node.number, given.slot, node.number, len(inputs), kind])
                socket: dict[str, Any] = {"name": name, "type": kind, "link": len(links)}
                if is_widget(spec):
                    socket["widget"] = {"name": name}
                inputs.append(socket)
            elif not is_widget(spec):
                inputs.append({"name": name, "type": spec[0], "link": None})
            if is_widget(spec):
                widgets += self._widget(name, spec, node)
        ours = node.kind.startswith("UniDiffuser")
        properties: dict[str, Any] = {"Node name for S&R": node.kind, "cnr_id": "unidiffuser" if ours else "comfy-core"}
        if ours:
            properties["ver"] = VERSION
        if node.kind == "UniDiffuserLoader":
            properties["models"] = [LARGE_MODEL]
        if node.kind == "CheckpointLoaderSimple":
            properties["models"] = [SD15]
        out = [
            {"name": label, "type": kind, "links": None, "slot_index": i}
            for i, (label, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ]
        result = {
            "id": node.number,
            "type": node.kind,
            "pos": list(node.at),
            "size": list(self.size(node)),
            "flags": {},
            "order": node.number - 1,
            "mode": node.mode,
            "inputs": inputs,
            "outputs": out,
            "properties": properties,
            "widgets_values": widgets,
        }
        return result | ({"title": node.title} if node.title else {})

    def _widget(self, name: str, spec: list[Any], node: Node) -> list[Any]:
        """A widget's saved values: its own, those of the inputs it opens, and the seed's control."""
        options = spec[1] if len(spec) > 1 else {}
        value = node.inputs.get(name, default_of(spec))
        values = [default_of(spec) if isinstance(value, Out) else value]
        if spec[0].startswith("COMFY_DYNAMICCOMBO") if isinstance(spec[0], str) else False:
            chosen = next(option for option in options["options"] if option["key"] == value)
            for group in chosen["inputs"].values():
                values += [node.inputs.get(f"{name}.{inner}", default_of(inner_spec)) for inner, inner_spec in group.items()]
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
        return values

    # The API's form

    def api(self) -> dict[str, Any]:
        """What the front end queues: without muted nodes, bypassed ones replaced by what they pass on."""
        running = [node for node in self.nodes if node.mode == RUN]
        return {str(node.number): {"class_type": node.kind, "inputs": self._values(node)} for node in running}

    def _values(self, node: Node) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, spec in self.slots(node.kind).items():
            given = node.inputs.get(name)
            if isinstance(given, Out):
                source = self._source(given)
                if source is not None:
                    values[name] = [str(source.node.number), source.slot]
            elif is_widget(spec):
                values[name] = default_of(spec) if given is None else given
        nested = {name: value for name, value in node.inputs.items() if "." in name}
        return values | nested

    def _source(self, out: Out) -> Out | None:
        if out.node.mode != BYPASSED:
            return out
        kind = self.info[out.node.kind]["output"][out.slot]
        for given in out.node.inputs.values():  # the front end passes on the first input of the same type
            if isinstance(given, Out) and self.info[given.node.kind]["output"][given.slot] == kind:
                return self._source(given)
        return None


def is_widget(spec: list[Any]) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    simple = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
    return simple and not options.get("forceInput")


def default_of(spec: list[Any]) -> Any:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0] if kind else ""
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    if kind == "COMBO":
        return options["options"][0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]


GRAPH_IN, GRAPH_OUT = -10, -20  # the front end's numbers for the two ends of a subgraph


def blueprint(info: Info, title: str, build: Any) -> dict[str, Any]:
    """A ready subgraph with one IMAGE input; `build` gets the input and returns {name: output}."""
    parts = Parts({**info, "@image": {"output": ["IMAGE"]}}, title)
    flow = parts.flow
    outputs = build(parts, Out(Node(flow, GRAPH_IN, "@image", (0, 0), {}, RUN, ""), 0))
    links: list[list[Any]] = []
    nodes = [flow._node(node, links) for node in flow.nodes]
    for slot, out in enumerate(outputs.values()):
        kind = flow.info[out.node.kind]["output"][out.slot]
        links.append([len(links) + 1, out.node.number, out.slot, GRAPH_OUT, slot, kind])
    for link in links:
        if link[1] > 0:
            output = nodes[link[1] - 1]["outputs"][link[2]]
            output["links"] = [*(output["links"] or []), link[0]]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    ident = str(uuid.uuid5(uuid.NAMESPACE_URL, f"unidiffuser/{title}"))
    right = int(max(node.at[0] for node in flow.nodes)) + 400

    def socket(name: str, kind: str, wanted: list[int], x: int) -> dict[str, Any]:
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{ident}/{name}")),
            "name": name,
            "type": kind,
            "linkIds": wanted,
            "pos": [x, 20],
        }

    into = [link[0] for link in links if link[1] == GRAPH_IN]
    ends = {slot: [link[0] for link in links if link[3] == GRAPH_OUT and link[4] == slot] for slot in range(len(outputs))}
    kinds = {name: flow.info[out.node.kind]["output"][out.slot] for name, out in outputs.items()}
    subgraph = {
        "id": ident,
        "version": 1,
        "revision": 0,
        "config": {},
        "name": title,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": GRAPH_IN, "bounding": [-200, 0, 120, 60]},
        "outputNode": {"id": GRAPH_OUT, "bounding": [right, 0, 120, 60]},
        "inputs": [socket("image", "IMAGE", into, -100)],
        "outputs": [socket(name, kinds[name], ends[slot], right + 20) for slot, name in enumerate(outputs)],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "extra": {},
    }
    holder = {
        "id": 1,
        "type": ident,
        "pos": [0, 0],
        "size": [300, 90],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": title,
        "inputs": [{"name": "image", "type": "IMAGE", "link": None}],
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in kinds.items()],
        "properties": {"cnr_id": "unidiffuser", "ver": VERSION},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [holder],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }


def describe_a_picture(p: Parts, image: Out) -> dict[str, Out]:
    latent, token = p.encoded(image)
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    return {"caption": p.add("UniDiffuserDecodeCaption", 3, caption_decoder=p.decoder, text=made[2])[0]}


def vary_a_picture(p: Parts, image: Out) -> dict[str, Out]:
    latent, token = p.encoded(image)
    described = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    made = p.sampler(p.path("text to image", 2, **HOLD), 3, text=described[2], latent_image=latent)
    return {"image": p.add("VAEDecode", 4, samples=made[0], vae=p.vae)[0], "text": described[2]}


BLUEPRINTS = {"UniDiffuser - Describe a picture": describe_a_picture, "UniDiffuser - Vary a picture": vary_a_picture}


class Parts:
    """What most workflows begin with."""

    def __init__(self, info: Info, note: str):
        self.flow = Flow(info, note)
        loader = self.flow.add("UniDiffuserLoader", 0, model_name=MODEL)
        self.model, self.clip, self.vae, self.vision, self.decoder = (loader[i] for i in range(5))

    def add(self, kind: str, column: float, mode: int = RUN, title: str = "", **inputs: Any) -> Node:
        return self.flow.add(kind, column, mode, title, **inputs)

    def picture(self, name: str = "red apple") -> Out:
        example = self.add("UniDiffuserExamplePicture", 0, picture=name)
        self.add("LoadImage", 0, BYPASSED, "Your own picture: enable and connect", image="example.png")
        return example[0]

    def encoded(self, picture: Out) -> tuple[Out, Out]:
        return (
            self.add("VAEEncode", 1, pixels=picture, vae=self.vae)[0],
            self.add("CLIPVisionEncode", 1, clip_vision=self.vision, image=picture, crop="center")[0],
        )

    def path(self, task: str, column: float = 1, steps: int = 20, **levels: float) -> Out:
        return self.add(
            "UniDiffuserNoisePath", column, task=task, steps=steps, **{f"task.{name}": value for name, value in levels.items()}
        )[0]

    def sampler(self, path: Out, column: float = 2, **inputs: Any) -> Node:
        return self.add("UniDiffuserSampler", column, model=self.model, path=path, caption_decoder=self.decoder, **inputs)

    def text(self, text: str | Out, column: float = 1, clip: Out | None = None, mode: int = RUN) -> Out:
        return self.add("CLIPTextEncode", column, mode, clip=clip or self.clip, text=text)[0]

    def empty(self, batch: int = 1, column: float = 1) -> Out:
        return self.add("EmptyLatentImage", column, width=128, height=128, batch_size=batch)[0]

    def show(self, latent: Out, column: float = 3, vae: Out | None = None, mode: int = RUN) -> Out:
        image = self.add("VAEDecode", column, mode, samples=latent, vae=vae or self.vae)[0]
        self.add("SaveImage", column, mode, images=image, filename_prefix="UniDiffuser")
        return image

    def caption(self, text: Out, column: float = 3, **inputs: Any) -> Node:
        words = self.add("UniDiffuserDecodeCaption", column, caption_decoder=self.decoder, text=text, **inputs)
        self.add("PreviewAny", column, source=words[1])
        return words


HOLD = {"start": 1000, "hold": 0}
BOTH = {"image_start": 1000, "text_start": 1000, "speed_image": 1, "speed_text": 1}


def text_to_image(info: Info) -> Flow:
    p = Parts(info, "**Text to image** with core nodes only: KSampler works on this MODEL as on any other.")
    made = p.add(
        "KSampler",
        2,
        model=p.model,
        positive=p.text("red apple, noto"),
        negative=p.text(""),
        latent_image=p.empty(4),
        steps=20,
        cfg=4.0,
        sampler_name="dpmpp_2m",
        scheduler="normal",
        seed=0,
    )
    p.show(made[0])
    return p.flow


def image_to_text(info: Info) -> Flow:
    p = Parts(info, "**Image to text**: the picture stays clean, the text is made; captions come best first.")
    latent, token = p.encoded(p.picture())
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    p.caption(made[2], candidates=3)
    return p.flow


def joint(info: Info) -> Flow:
    p = Parts(info, "**Joint pairs**: pictures and their captions together, out of nothing.")
    made = p.sampler(p.path("joint", **BOTH), latent_image=p.empty(4))
    p.show(made[0])
    p.caption(made[2])
    return p.flow


def image_variation(info: Info) -> Flow:
    p = Parts(
        info, "**Image variation**: the picture becomes a text latent, the text latent becomes pictures. No words in between."
    )
    latent, token = p.encoded(p.picture("cat face"))
    described = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    made = p.sampler(p.path("text to image", 2, **HOLD), 3, text=described[2], latent_image=p.empty(4))
    p.show(made[0], 4)
    p.caption(described[2])
    return p.flow


def text_variation(info: Info) -> Flow:
    p = Parts(info, "**Text variation**: the text becomes a picture latent, that becomes a text. No pixels in between.")
    painted = p.sampler(p.path("text to image", **HOLD), text=p.text("red apple, noto"), latent_image=p.empty(4))
    made = p.sampler(p.path("image to text", 2, **HOLD), 3, latent_image=painted[0], clip_vision_output=painted[1])
    p.caption(made[2], 4)
    p.show(painted[0])
    return p.flow


def gibbs_chain(info: Info) -> Flow:
    p = Parts(
        info, "**Gibbs chain**: describe, paint, describe, paint. Raise *rounds* and run again: finished rounds are kept."
    )
    latent, token = p.encoded(p.picture("sunflower"))
    chain = p.add(
        "UniDiffuserGibbsChain",
        2,
        model=p.model,
        vae=p.vae,
        caption_decoder=p.decoder,
        latent_image=latent,
        clip_vision_output=token,
    )
    p.add("SaveImage", 3, images=chain[0], filename_prefix="UniDiffuser")
    p.add("PreviewAny", 3, source=chain[1])
    return p.flow


def interpolation(info: Info) -> Flow:
    p = Parts(info, "**Interpolation** between two real pictures, by their noises and texts.")
    first = p.picture("red apple")
    second = p.add("UniDiffuserExamplePicture", 0, picture="sunflower")[0]
    frames = p.add("UniDiffuserInterpolate", 1, model=p.model, clip_vision=p.vision, vae=p.vae, image_a=first, image_b=second)
    p.add("SaveAnimatedWEBP", 2, images=frames[0], filename_prefix="UniDiffuser", fps=6.0)
    p.add("PreviewImage", 2, images=frames[0])
    p.caption(frames[1], 2)
    return p.flow


def inpainting(info: Info) -> Flow:
    p = Parts(info, "**Inpainting**: the right half is made anew to fit the text. Paint your own mask in Load Image.")
    latent, token = p.encoded(p.picture("cat face"))
    left = p.add("SolidMask", 1, value=0.0, width=128, height=128)[0]
    right = p.add("SolidMask", 1, value=1.0, width=64, height=128)[0]
    mask = p.add("MaskComposite", 1, destination=left, source=right, x=64, y=0, operation="add")[0]
    masked = p.add("SetLatentNoiseMask", 1, samples=latent, mask=mask)[0]
    made = p.sampler(
        p.path("text to image", 1.98, **HOLD), text=p.text("fox, noto"), latent_image=masked, clip_vision_output=token
    )
    p.show(made[0])
    return p.flow


def partial_caption(info: Info) -> Flow:
    p = Parts(info, "**Partial caption rewriting**: the marked words are found anew to fit the picture, the others stay.")
    latent, token = p.encoded(p.picture("red apple"))
    text = p.add("UniDiffuserRewriteWords", 1, clip=p.clip, text="green apple, noto", words="green", rest=False)[0]
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token, text=text)
    p.caption(made[2], candidates=3)
    return p.flow


def noise_paths(info: Info) -> Flow:
    p = Parts(info, "**Noise paths**: the same seed along three ways: together, text first, picture first.")
    size = p.empty(2)
    ways: list[tuple[str, dict[str, float]]] = [
        ("joint", BOTH),
        ("joint", BOTH | {"speed_text": 3}),
        ("joint", BOTH | {"speed_image": 3}),
    ]
    for row, (task, levels) in enumerate(ways):
        made = p.sampler(p.path(task, 1, **levels), 2, latent_image=size, seed=3)
        p.show(made[0], 3)
        p.caption(made[2], 4)
        del row
    return p.flow


def caption_then_sd15(info: Info) -> Flow:
    p = Parts(
        info,
        "**Caption, then Stable Diffusion 1.5**: the caption is the prompt of another model. Put the checkpoint into "
        "models/checkpoints and unmute the right half.",
    )
    latent, token = p.encoded(p.picture("house"))
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    words = p.caption(made[2])
    sd = p.add("CheckpointLoaderSimple", 4, MUTED, ckpt_name=SD15["name"])
    size = p.add("EmptyLatentImage", 4, MUTED, width=512, height=512, batch_size=1)[0]
    painted = p.add(
        "KSampler",
        5,
        MUTED,
        model=sd[0],
        positive=p.text(words[0], 4, sd[1], MUTED),
        negative=p.text("", 4, sd[1], MUTED),
        latent_image=size,
        steps=20,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        seed=0,
    )
    p.show(painted[0], 5, sd[2], MUTED)
    return p.flow


def latent_to_sd15(info: Info) -> Flow:
    p = Parts(
        info,
        "**Hand-over to Stable Diffusion 1.5**: the 1 B model's LATENT is Stable Diffusion's, so another model refines it. "
        "Choose the 1 B model, put the SD 1.5 checkpoint into models/checkpoints and enable the bypassed nodes.",
    )
    made = p.sampler(p.path("joint", **BOTH), latent_image=p.empty(1))
    words = p.caption(made[2])
    sd = p.add("CheckpointLoaderSimple", 4, BYPASSED, ckpt_name=SD15["name"])
    refined = p.add(
        "KSampler",
        5,
        BYPASSED,
        latent_image=made[0],
        model=sd[0],
        positive=p.text(words[0], 4, sd[1], BYPASSED),
        negative=p.text("", 4, sd[1], BYPASSED),
        steps=20,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=0.5,
        seed=0,
    )
    p.show(refined[0], 5)
    return p.flow


WORKFLOWS = {
    "Text to image": text_to_image,
    "Image to text": image_to_text,
    "Joint pairs": joint,
    "Image variation": image_variation,
    "Text variation": text_variation,
    "Gibbs chain": gibbs_chain,
    "Interpolation": interpolation,
    "Inpainting": inpainting,
    "Partial caption rewriting": partial_caption,
    "Noise path exploration": noise_paths,
    "Caption then Stable Diffusion 1.5": caption_then_sd15,
    "Hand-over to Stable Diffusion 1.5": latent_to_sd15,
}


def main(address: str) -> None:
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        info = json.load(answer)
    API_FOLDER.mkdir(exist_ok=True)
    for title, build in WORKFLOWS.items():
        flow = build(info)
        for folder, form in ((ROOT / "workflows", flow.front_end()), (API_FOLDER, flow.api())):
            text = json.dumps(form, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{title}.json").write_text(text, encoding="utf-8")
    for title, build in BLUEPRINTS.items():
        text = json.dumps(blueprint(info, title, build), indent=1, ensure_ascii=False) + "\n"
        (ROOT / "subgraphs" / f"{title}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
