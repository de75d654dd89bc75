"""Nodes of this pack in the host's front end, driven by mouse, touch and keyboard as a person does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from front_end import READY, SETTLE, START, FrontEnd
from playwright.sync_api import Locator

Point = tuple[float, float]
PATIENCE = 20_000  # milliseconds
OURS = ("/extensions/UniDiffuser/", "unidiffuser")
ADD = """([type, at]) => {
    const node = LiteGraph.createNode(type);
    node.pos = at;
    app.graph.add(node);
    app.canvas.setDirty(true, true);
    return node.id;
}"""
SET = """([id, name, value]) => {
    const node = app.graph.getNodeById(id), widget = node.widgets.find((w) => w.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
VALUES = """(id) => Object.fromEntries(app.graph.getNodeById(id).widgets.filter((w) => w.name !== 'path')
    .map((w) => [w.name.replace('task.', ''), w.value]))"""
CLEAR = """() => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    Object.assign(app.canvas.ds, {scale: 1, offset: [0, 0]});
}"""
WIRE = """([source, output, target, name]) => {
    const [from, to] = [source, target].map((id) => app.graph.getNodeById(id));
    from.connect(output, to, to.inputs.findIndex((input) => input.name === name));
}"""
MARK = """(id) => {
    app.graph.getNodeById(id).widgets.find((w) => w.name === 'path').element.dataset.test = id;
}"""
BARE = """([vue, palette]) => {
    const { setting } = app.extensionManager;
    return (async () => {
        await setting.set('Comfy.VueNodes.Enabled', vue);
        await setting.set('Comfy.ColorPalette', palette);
        await setting.set('Comfy.Graph.CanvasMenu', false);
        await setting.set('Comfy.Minimap.Visible', false);
    })();
}"""
HOST_TEXT = """(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === '$$node-text-preview')?.value ?? ''"""
PLACE_OF_WIDGET = """([id, name]) => {
    const node = app.graph.getNodeById(id), widget = node.widgets.find((w) => w.name === name);
    const {scale, offset} = app.canvas.ds, place = app.canvas.canvas.getBoundingClientRect();
    return [place.x + (node.pos[0] + node.size[0] * 0.6 + offset[0]) * scale,
        place.y + (node.pos[1] + widget.last_y + 10 + offset[1]) * scale];
}"""

DRAWING = (
    ("loader", 0, "sampler", "model"),
    ("loader", 1, "text", "clip"),
    ("text", 0, "sampler", "positive"),
    ("text", 0, "sampler", "negative"),
    ("latent", 0, "sampler", "latent_image"),
    ("sampler", 0, "image", "samples"),
    ("loader", 2, "image", "vae"),
    ("image", 0, "preview", "images"),
)


class NodePage:
    """An empty workflow in one renderer: "classic" (canvas) or "vue"."""

    def __init__(self, front_end: FrontEnd, renderer: str):
        self.front_end, self.page, self.renderer = front_end, front_end.page, renderer
        self.page.set_default_timeout(PATIENCE)
        self.look(renderer)

    def look(self, renderer: str, palette: str = "dark") -> None:
        self.renderer = renderer
        self.page.evaluate(BARE, [renderer == "vue", palette])
        self.page.wait_for_timeout(500)

    def clear(self) -> None:
        """An empty workflow, with no dialog over it: a new front end offers its templates."""
        for _ in range(3):
            if self.front_end.dialog().count():
                self.press("Escape")
        self.page.evaluate(CLEAR)
        self.front_end.take_messages()

    def reload(self) -> None:
        self.page.reload(timeout=START)
        self.page.wait_for_function(READY, timeout=START)
        self.page.wait_for_timeout(2 * SETTLE)
        self.page.keyboard.press("Escape")

    def zoom(self, scale: float, offset: Point = (0, 0)) -> None:
        self.page.evaluate(
            "([scale, offset]) => { Object.assign(app.canvas.ds, {scale, offset}); app.canvas.setDirty(true, true); }",
            [scale, list(offset)],
        )
        self.page.wait_for_timeout(700)

    def add(self, kind: str = "UniDiffuserNoisePath", at: Point = (150, 120), **values: Any) -> NoisePathNode:
        """A new node, with values of its widgets."""
        node = NoisePathNode(self, self.page.evaluate(ADD, [kind, list(at)]))
        self.page.wait_for_timeout(700)
        for name, value in values.items():
            node.set(name, value)
        return node

    def known(self, node: Any) -> NoisePathNode:
        """A node that is already there."""
        return NoisePathNode(self, node)

    def reopen(self, node: NoisePathNode) -> NoisePathNode:
        """The node after its workflow was saved and opened again."""
        self.front_end.open_workflow(self.page.evaluate("() => app.graph.serialize()"))
        return self.known(node.id)

    def wire(self, source: Any, output: int, target: Any, name: str) -> None:
        """Connect an output to the input of that name."""
        self.page.evaluate(WIRE, [source, output, target, name])

    def wire_all(self, ids: dict[str, Any], wires: Iterable[tuple[str, int, str, str]]) -> None:
        """Connect nodes by their names in `ids`, each wire as (source, output, target, name of the input)."""
        for source, output, target, name in wires:
            self.wire(ids[source], output, ids[target], name)

    def draw_a_text(self, model: str, side: int, text: str = "", **sampler: Any) -> dict[str, NoisePathNode]:
        """Loader, prompt, KSampler with these values, and preview: the nodes by their names in `DRAWING`."""
        nodes = {
            "loader": self.add("UniDiffuserLoader", (20, 90), model_name=model),
            "latent": self.add("EmptyLatentImage", (20, 300), width=side, height=side),
            "text": self.add("CLIPTextEncode", (360, 90), text=text),
            "sampler": self.add("KSampler", (800, 90), **sampler),
            "image": self.add("VAEDecode", (360, 400)),
            "preview": self.add("PreviewImage", (360, 520)),
        }
        self.wire_all({name: node.id for name, node in nodes.items()}, DRAWING)
        return nodes

    def messages(self) -> list[str]:
        """The console's errors that come from this pack."""
        return [message for message in self.front_end.take_messages() if any(word in message.lower() for word in OURS)]

    def prompt(self) -> dict[str, Any]:
        return self.front_end.prompt()

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)
        self.page.wait_for_timeout(400)

    def until(self, holds: Callable[[], bool], seconds: float = 15) -> bool:
        """Whether a condition comes true in time; undo reloads the graph, which takes long on a busy machine."""
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            self.page.wait_for_timeout(200)
        self.page.wait_for_timeout(800)
        return holds()


class NoisePathNode:
    """A Noise Path node and its square; points are (image noise, caption noise)."""

    def __init__(self, page: NodePage, node: Any):
        self.owner, self.page, self.id = page, page.page, node

    @property
    def square(self) -> Locator:
        """The editor of this node."""
        self.page.evaluate(MARK, self.id)
        return self.page.locator(f".ud-path[data-test='{self.id}']")

    def values(self) -> dict[str, Any]:
        return self.page.evaluate(VALUES, self.id)

    def set(self, name: str, value: Any) -> None:
        self.page.evaluate(SET, [self.id, name, value])
        self.page.wait_for_timeout(300)

    def size(self) -> Point:
        """Width and height that a workflow is saved with, in whole pixels."""
        width, height = self.page.evaluate("(id) => [...app.graph.getNodeById(id).size]", self.id)
        return round(width), round(height)

    def resize(self, size: Point) -> None:
        self.page.evaluate("([id, size]) => app.graph.getNodeById(id).setSize(size)", [self.id, list(size)])
        self.page.wait_for_timeout(300)

    def sent(self) -> dict[str, Any]:
        """The values in the prompt that the front end would queue."""
        inputs = self.owner.prompt()[str(self.id)]["inputs"]
        return {name.removeprefix("task."): value for name, value in inputs.items()}

    def place(self, point: Point) -> Point:
        """Where a point is on the page."""
        box = self.square.locator(".ud-box").bounding_box()
        return box["x"] + box["width"] * point[0] / 1000, box["y"] + box["height"] * (1 - point[1] / 1000)

    def settle(self) -> None:
        """Wait until the square keeps its place: a busy page moves it late."""
        box = self.square.locator(".ud-box")
        before = None
        for _ in range(100):
            here = box.bounding_box()
            if here is not None and here == before:
                return
            before = here
            self.page.wait_for_timeout(200)
        raise TimeoutError("the square does not come to rest")

    def drag(self, start: Point, *ways: Point, release: bool = True) -> None:
        """Drag with the mouse from a point over others."""
        self.settle()
        self.page.mouse.move(*self.place(start))
        self.page.mouse.down()
        for way in ways:
            self.page.mouse.move(*self.place(way), steps=4)
        if release:
            self.page.mouse.up()
        self.page.wait_for_timeout(250)

    def touch(self, start: Point, *ways: Point) -> None:
        """Drag with a finger."""
        self.settle()
        session = self.page.context.new_cdp_session(self.page)
        for kind, point in [("touchStart", start), *(("touchMove", way) for way in ways), ("touchEnd", None)]:
            points = [] if point is None else [dict(zip("xy", self.place(point), strict=True))]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        session.detach()
        self.page.wait_for_timeout(250)

    def drawn(self) -> list[Point]:
        """The points of the curve as it is drawn, to whole levels."""
        box, scale = (32, 14), 1000 / 252  # of the view box, in plot.js
        points = self.square.locator(".ud-line").get_attribute("points") or ""
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        return [(round((x - box[0]) * scale), round(1000 - (y - box[1]) * scale)) for x, y in pairs]

    def status(self) -> str:
        return self.square.locator(".ud-path-status").inner_text()

    def status_fits(self) -> bool:
        """Whether the whole status is seen."""
        return self.square.locator(".ud-path-status").evaluate("(e) => e.scrollHeight <= e.clientHeight")

    def host_text(self) -> str:
        """The text that the server has sent to the node, if the front end shows it."""
        return self.page.evaluate(HOST_TEXT, self.id)

    def texts(self) -> str:
        """What the Vue renderer writes in the node."""
        return self.page.locator(f"[data-node-id='{self.id}']").inner_text()

    def handle(self, number: int) -> Locator:
        return self.square.locator(".ud-handle").nth(number)

    def preset(self, name: str) -> None:
        self.square.locator(f"[data-preset='{name}']").click()
        self.page.wait_for_timeout(400)

    def type(self, widget: str, value: str) -> None:
        """Type a value into a widget of the node."""
        if self.owner.renderer == "vue":
            label = widget.removeprefix("task.")
            row = self.page.locator(f"[data-node-id='{self.id}']").locator(".lg-node-widget").filter(has_text=label).first
            field = row.locator("input").first
            box = field.bounding_box()
            self.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            self.page.wait_for_timeout(200)
            self.page.keyboard.press("Control+a")
            self.page.keyboard.type(value)
            self.page.keyboard.press("Enter")
            self.page.keyboard.press("Tab")
        else:
            self.page.mouse.dblclick(*self.page.evaluate(PLACE_OF_WIDGET, [self.id, widget]))
            field = self.page.locator(".graphdialog input")
            field.fill(value)
            field.press("Enter")
        self.page.wait_for_timeout(400)
