"""The host's real front end in a browser: opens workflows as a person does, runs them and looks at the page.

Needs playwright (`pip install playwright`) and a Chromium: the system's, CHROMIUM, or `playwright install chromium`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fresh_host import forget
from host_server import HostServer, error_of
from playwright.sync_api import ConsoleMessage, Locator, Page, sync_playwright

START = 300_000  # milliseconds until the page has loaded, on a busy machine
SETTLE = 2_000  # milliseconds for drawing and fetching after an action
QUEUED = 30  # seconds from Run to the server's queue
READY = "() => window.app?.graph && window.app?.extensionManager"
BOXES = """() => {
    const canvas = app.canvas, place = canvas.canvas.getBoundingClientRect(), {scale, offset} = canvas.ds;
    return app.graph._nodes.map(node => {
        const [x, y, width, height] = node.boundingRect ?? node.getBounding();
        return {id: node.id, type: node.type, title: node.title, x: place.x + (x + offset[0]) * scale,
            y: place.y + (y + offset[1]) * scale, width: width * scale, height: height * scale};
    });
}"""
BLUEPRINT = """async (title) => {
    const all = await (await fetch('/api/global_subgraphs')).json();
    const id = Object.keys(all).find(key => all[key].name === title);
    return JSON.parse((await (await fetch('/api/global_subgraphs/' + id)).json()).data);
}"""
WIRE = """async (picture) => {
    const [holder] = app.graph._nodes, add = (type, at) => {
        const node = LiteGraph.createNode(type); node.pos = at; app.graph.add(node); return node;
    };
    const source = add('UniDiffuserExamplePicture', [-450, 0]);
    source.widgets[0].value = picture;
    if (holder.inputs[0].type === 'IMAGE') source.connect(0, holder, 0);
    holder.outputs.forEach((output, slot) => {
        const kind = {IMAGE: 'PreviewImage', STRING: 'PreviewAny'}[output.type];
        if (kind) holder.connect(slot, add(kind, [450, 350 * slot]), 0);
    });
}"""


class FrontEnd:
    """One page of the front end of `server`. `messages` are the console's errors since the last `take_messages`."""

    def __init__(self, page: Page, server: HostServer):
        self.page, self.server = page, server
        self._messages: list[str] = []
        page.set_default_timeout(START)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._messages.append(f"{error}\n{error.stack or ''}"))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_function(READY)
        page.wait_for_timeout(2 * SETTLE)
        page.keyboard.press("Escape")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._messages.append(f"{message.text} [{message.location.get('url', '')}]")

    def take_messages(self) -> list[str]:
        taken, self._messages = self._messages, []
        return taken

    def refresh(self) -> None:
        """Refresh the lists of files, as the key R does."""
        self.page.evaluate("async () => { await app.refreshComboInNodes(); }")
        self.settle()

    def open_template(self, name: str, title: str) -> None:
        """Open a template, by its file name in the Templates dialog; `title` is that of its note."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text("UniDiffuser", exact=True).first.click()
        dialog.get_by_text(name, exact=True).first.click()
        self._opened(title)

    def open_workflow(self, form: dict[str, Any]) -> None:
        """Load a workflow as the Templates dialog does after fetching the file."""
        self.page.evaluate("async (form) => { await app.loadGraphData(form, true, true); }", form)
        self.settle()

    def open_blueprint(self, title: str, picture: str) -> None:
        """Open a blueprint between an example image and previews of its outputs."""
        self.open_workflow(self.page.evaluate(BLUEPRINT, title))
        self.page.evaluate(WIRE, picture)
        self.settle()

    def _opened(self, title: str) -> None:
        self.page.wait_for_function("(title) => app.graph._nodes.some(node => node.title === title)", arg=title)
        self.settle()

    def run(self) -> str:
        """Press Run on a host with empty caches and wait: "success", or the error."""
        # NOTE: caches are emptied because the page misses images of cached nodes, sent before the prompt's id.
        forget(self.server)
        before = set(self.server.get("/history"))
        self.page.get_by_test_id("queue-button").click()
        end, made = time.monotonic() + QUEUED, []
        while not made and (time.monotonic() < end or any(self.server.get("/queue").values())):
            self.page.wait_for_timeout(500)
            made = [entry for name, entry in self.server.get("/history").items() if name not in before]
        self.settle()
        if not made:
            return "nothing was queued"
        return "success" if made[0]["status"]["status_str"] == "success" else error_of(made[0])

    def prompt(self) -> dict[str, Any]:
        """The prompt that the front end would queue."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def fit(self) -> None:
        """Show the whole workflow."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(SETTLE)

    def nodes(self) -> list[dict[str, Any]]:
        """{id, type, title, x, y, width, height} of the nodes, in pixels of the page."""
        return self.page.evaluate(BOXES)

    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog")

    def screenshot(self, path: Path, kinds: tuple[str, ...] = (), margin: float = 12) -> None:
        """A screenshot of the page, or of the nodes of some types with their badges."""
        path.parent.mkdir(parents=True, exist_ok=True)
        boxes = [box for box in self.nodes() if box["type"] in kinds]
        settings: dict[str, Any] = {"path": path}
        if boxes:
            left, top = min(box["x"] for box in boxes) - margin, min(box["y"] for box in boxes) - 3 * margin
            right = max(box["x"] + box["width"] for box in boxes) + margin
            bottom = max(box["y"] + box["height"] for box in boxes) + margin
            settings["clip"] = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        self.page.screenshot(**settings)


def overlaps(boxes: list[dict[str, Any]]) -> list[str]:
    """Pairs of overlapping nodes."""
    return [
        f"{a['title']} / {b['title']}"
        for k, a in enumerate(boxes)
        for b in boxes[k + 1 :]
        if min(a["x"] + a["width"], b["x"] + b["width"]) > max(a["x"], b["x"])
        and min(a["y"] + a["height"], b["y"] + b["height"]) > max(a["y"], b["y"])
    ]


@contextmanager
def front_end(server: HostServer, width: int = 2600, height: int = 1400) -> Iterator[FrontEnd]:
    """A page in a browser, closed after the block."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        # NOTE: no sandbox, because scripts in containers run as root.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield FrontEnd(browser.new_page(viewport={"width": width, "height": height}), server)
        finally:
            browser.close()
