"""Builds a workflow and writes it in two formats: the front end's and the API's."""

from __future__ import annotations

import uuid
from typing import Any

VERSION = "0.1.0"
RUN, MUTED, BYPASSED = 0, 2, 4
WIDTH, GAP, TITLE = 330, 40, 30  # width of a node, gap between columns, height of the title bar
COLUMN = WIDTH + GAP
GROUP_MARGIN, GROUP_TITLE = 16, 40
LINE = 18
NOTE_LINE, NOTE_LETTERS, NOTE_ROOM = 20, 46, 40  # of the note: height and letters of a line, height around the text
VIEW = (1600, 920)  # pixels of the canvas of a small window
LEAST_SCALE = 0.65  # below it the host draws no text that can be read
ROOM = {  # height below slots and widgets, for what a node shows after a run
    "UniDiffuserLoader": 64,
    "PreviewImage": 260,
    "SaveImage": 310,
    "SaveAnimatedWEBP": 260,
    "UniDiffuserNoisePath": 410,
    "UniDiffuserExamplePicture": 250,
    "LoadImage": 60,
    "UniDiffuserSampler": 60,
    "UniDiffuserDecodeCaption": 60,
    "UniDiffuserScoreCaptions": 150,
    "UniDiffuserGibbsChain": 300,
    "UniDiffuserCaptionPicture": 120,
    "UniDiffuserShowPairs": 260,
    "PreviewAny": 70,
    "CLIPTextEncode": 60,
    "UniDiffuserRewriteWords": 60,
}
PREVIEWS = (  # nodes that grow downwards, by the host's preview of what they sample
    "KSampler",
    "UniDiffuserInterpolate",
    "UniDiffuserInvert",
    "UniDiffuserSampler",
    "UniDiffuserTextToPair",
)
Info = dict[str, Any]
Models = dict[str, list[dict[str, str]]]


class Out:
    """Output `slot` of a node."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot


class Node:
    """One node; `node[k]` is its output k."""

    def __init__(self, number: int, kind: str, at: tuple[int, int], inputs: dict[str, Any], mode: int = RUN, title: str = ""):
        self.number, self.kind, self.at, self.inputs, self.mode, self.title = number, kind, at, inputs, mode, title
        self.lines = 0  # of text to reserve room for
        self.collapsed = False  # to its title bar

    def __getitem__(self, slot: int) -> Out:
        return Out(self, slot)


class Flow:
    """Nodes in columns, one below the other; a sampler is the lowest, so that its preview covers nothing.

    Args:
        info: the host's /object_info.
        title, note: of the note at the upper left.
        models: by node kind, the files that the host's missing-model dialog offers.
    """

    def __init__(self, info: Info, title: str, note: str, models: Models | None = None):
        self.info, self.title, self.note, self.models = info, title, note, models or {}
        self.nodes: list[Node] = []
        self.groups: list[tuple[str, list[Node]]] = []
        self.heights: dict[int, int] = {0: self.note_height() + TITLE + GAP // 2}

    def add(
        self, kind: str, column: int, mode: int = RUN, title: str = "", lines: int = 0, collapsed: bool = False, **inputs: Any
    ) -> Node:
        x, y = column * COLUMN, self.heights.get(column, 0)
        node = Node(len(self.nodes) + 1, kind, (x, y), inputs, mode, title)
        node.lines, node.collapsed = lines, collapsed
        height = (0 if collapsed else self.size(node)[1]) + TITLE + GAP // 2
        above = max((other for other in self.nodes if other.at[0] == x), key=lambda other: other.at[1], default=None)
        if above and above.kind in PREVIEWS:
            node.at, above.at = above.at, (x, above.at[1] + height)
        self.heights[column] = y + height
        self.nodes.append(node)
        return node

    def space(self, column: int, height: int) -> None:
        """Leave a gap in a column, such as for the title of a group."""
        self.heights[column] = self.heights.get(column, 0) + height

    def note_height(self) -> int:
        lines = [-(-len(line) // NOTE_LETTERS) or 1 for line in self.note.split("\n")]
        return NOTE_ROOM + NOTE_LINE * sum(lines)

    def bounds(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of everything."""
        right = max(node.at[0] for node in self.nodes) + WIDTH
        bottom = max(self.heights.values()) - GAP // 2 - TITLE
        margin = GROUP_MARGIN if self.groups else 0
        return 0, -TITLE - (GROUP_TITLE if self.groups else 0), right + margin, bottom + margin

    def view(self) -> dict[str, Any]:
        """The front end's scale and offset that show everything in a small window."""
        left, top, right, bottom = self.bounds()
        scale = min(1, 0.94 * VIEW[0] / (right - left), 0.92 * VIEW[1] / (bottom - top))
        x, y = VIEW[0] / scale - left - right, VIEW[1] / scale - top - bottom
        return {"scale": round(scale, 3), "offset": [round(x / 2), round(y / 2) + 60]}

    def group(self, title: str, nodes: list[Node]) -> None:
        """A titled frame around nodes."""
        self.groups.append((title, nodes))

    def slots(self, kind: str) -> dict[str, list[Any]]:
        """Inputs of a node in the front end's order."""
        wanted = self.info[kind]["input"]
        return {**wanted.get("required", {}), **wanted.get("optional", {})}

    def size(self, node: Node) -> tuple[int, int]:
        slots = self.slots(node.kind)
        widgets = sum(map(is_widget, slots.values())) + sum("." in name for name in node.inputs)
        widgets += sum(bool(options_of(spec).get("control_after_generate")) for spec in slots.values())
        sockets = max(sum(not is_widget(spec) for spec in slots.values()), len(self.info[node.kind]["output"]))
        return WIDTH, 16 + 20 * sockets + 24 * widgets + ROOM.get(node.kind, 0) + LINE * node.lines

    # The front end's format

    def front_end(self) -> dict[str, Any]:
        links: list[list[Any]] = []
        nodes = [self.front_end_node(node, links) for node in self.nodes]
        join(nodes, links)
        note = {
            "id": len(nodes) + 1,
            "type": "MarkdownNote",
            "title": self.title,
            "pos": [0, 0],
            "size": [WIDTH, self.note_height()],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [self.note],
            "color": "#432",
            "bgcolor": "#653",
        }
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"unidiffuser/{self.title}")),
            "revision": 0,
            "last_node_id": len(nodes) + 1,
            "last_link_id": len(links),
            "nodes": [*nodes, note],
            "links": links,
            "groups": [self._group(number + 1, *group) for number, group in enumerate(self.groups)],
            "config": {},
            "extra": {"ds": self.view()},
            "version": 0.4,
        }

    def _group(self, number: int, title: str, nodes: list[Node]) -> dict[str, Any]:
        left, top = min(n.at[0] for n in nodes), min(n.at[1] for n in nodes) - TITLE
        right, bottom = max(n.at[0] + WIDTH for n in nodes), max(n.at[1] + self.size(n)[1] for n in nodes)
        x, y = left - GROUP_MARGIN, top - GROUP_TITLE
        bounding = [x, y, right - x + GROUP_MARGIN, bottom - y + GROUP_MARGIN]
        return {"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}

    def front_end_node(self, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        """One node in the front end's format; appends its incoming links to `links`."""
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
                widgets += widget_values(name, spec, node)
        ours = node.kind.startswith("UniDiffuser")
        properties: dict[str, Any] = {"Node name for S&R": node.kind, "cnr_id": "unidiffuser" if ours else "comfy-core"}
        if ours:
            properties["ver"] = VERSION
        if node.kind in self.models:
            properties["models"] = self.models[node.kind]
        outputs = zip(info["output_name"], info["output"], strict=True)
        result = {
            "id": node.number,
            "type": node.kind,
            "pos": list(node.at),
            "size": list(self.size(node)),
            "flags": {"collapsed": True} if node.collapsed else {},
            "order": node.number - 1,
            "mode": node.mode,
            "inputs": inputs,
            "outputs": [
                {"name": label, "type": kind, "links": None, "slot_index": i} for i, (label, kind) in enumerate(outputs)
            ],
            "properties": properties,
            "widgets_values": widgets,
        }
        return result | ({"title": node.title} if node.title else {})

    # The API's format

    def api(self) -> dict[str, Any]:
        """The prompt that the front end queues: without muted nodes, links through bypassed ones resolved."""
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
        for given in out.node.inputs.values():  # as the front end: the first input of the same type
            if isinstance(given, Out) and self.info[given.node.kind]["output"][given.slot] == kind:
                return self._source(given)
        return None


def join(nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
    """Add the ids of links [id, from node, slot, to node, slot, type] to the outputs where they start."""
    for link in links:
        if link[1] > 0:
            output = nodes[link[1] - 1]["outputs"][link[2]]
            output["links"] = [*(output["links"] or []), link[0]]


def options_of(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def is_widget(spec: list[Any]) -> bool:
    kind = spec[0]
    simple = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
    return simple and not options_of(spec).get("forceInput")


def kind_of(spec: list[Any]) -> str:
    """Type of an input; older hosts give a combo's choices in its place."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def default_of(spec: list[Any]) -> Any:
    kind, options = spec[0], options_of(spec)
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0] if kind else ""
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    if kind == "COMBO":
        return options["options"][0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]


def widget_values(name: str, spec: list[Any], node: Node) -> list[Any]:
    """The saved values of a widget: its own, those of a dynamic combo's inputs, and the seed's control."""
    options = options_of(spec)
    value = node.inputs.get(name, default_of(spec))
    values = [default_of(spec) if isinstance(value, Out) else value]
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        chosen = next(option for option in options["options"] if option["key"] == value)
        for group in chosen["inputs"].values():
            values += [node.inputs.get(f"{name}.{inner}", default_of(one)) for inner, one in group.items() if is_widget(one)]
    if options.get("control_after_generate"):
        values.append("fixed")
    if options.get("image_upload"):
        values.append("image")
    return values
