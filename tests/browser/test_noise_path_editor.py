"""The square in UniDiffuser Noise Path: what is drawn, typed and sent are the same."""

from __future__ import annotations

import itertools
import re

import pytest
from node_page import NodePage

CLOSE = 9  # levels, about two pixels
VISIBLE = 3  # contrast of a line, after WCAG 2.1, 1.4.11


def close(point: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a - b) <= CLOSE for a, b in zip(point, other, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two CSS colours such as rgb(1, 2, 3), after WCAG 2.1."""

    def luminance(colour: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_dragging_the_start_and_the_line_sets_the_inputs(page: NodePage) -> None:
    node = page.add()
    assert node.drawn()[0] == (1000, 0)
    node.drag((1000, 0), (600, 0))
    assert node.values()["start"] == pytest.approx(600, abs=CLOSE)
    node.drag((300, 0), (300, 200))
    assert node.values()["hold"] == pytest.approx(200, abs=CLOSE)
    assert node.sent() == node.values() | {"task": "text to image", "steps": 20, "spacing": "uniform"}
    points = node.drawn()
    assert len(points) == 21
    assert close(points[0], (600, 200))
    assert close(points[-1], (0, 200))


def test_a_drag_resists_at_the_edges_and_says_why(page: NodePage) -> None:
    node = page.add()
    node.preset("drawn")
    node.set("task.points", "1000,1000 500,500 0,0")
    node.drag((500, 500), (400, 300), (1200, 300), release=False)
    assert "1000" in node.status().splitlines()[0]
    assert "Noise runs from 0" in node.status()
    page.page.mouse.up()
    node.set("task.points", "1000,1000 500,500 0,0")
    node.drag((0, 0), (300, 200), release=False)
    assert "ends with the image or the caption at 0" in node.status()
    page.page.mouse.up()
    last = node.drawn()[-1]
    assert min(last) == 0
    assert close(last, (300, 0))
    node.drag((500, 500), (100, 800), release=False)
    assert "Noise can only fall" in node.status()
    page.page.mouse.up()
    points = node.drawn()
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(points))
    assert "Noise can only fall" not in node.status()


def test_the_words_below_the_square_are_seen_whole(page: NodePage) -> None:
    node = page.add()
    node.drag((1000, 0), (600, 0), release=False)
    assert "Starts from the connected image" in node.status()
    assert node.status_fits()
    page.page.mouse.up()
    node.preset("joint")
    node.drag((0, 0), (300, 0), release=False)
    assert "Draw a path to end elsewhere" in node.status()
    assert node.status_fits()
    page.page.mouse.up()


def test_a_press_beside_the_path_does_not_frame_the_square(page: NodePage) -> None:
    node = page.add()
    page.page.mouse.click(*node.place((300, 700)))
    assert page.page.evaluate("() => document.activeElement.tagName") != "svg"


def test_the_colours_follow_the_theme(page: NodePage) -> None:
    node, lines = page.add(), []
    for palette in ("light", "dark"):
        page.look(page.renderer, palette)
        lines.append(node.square.locator(".ud-line").evaluate("(line) => getComputedStyle(line).stroke"))
        ground = node.square.locator(".ud-path-square").evaluate("(square) => getComputedStyle(square).backgroundColor")
        assert contrast(lines[-1], ground) >= VISIBLE
    assert lines[0] != lines[1]


def test_a_point_is_added_by_dragging_the_line_and_removed_by_a_double_click(page: NodePage) -> None:
    node = page.add()
    node.preset("drawn")
    assert node.values()["task"] == "drawn"
    node.set("task.points", "1000,1000 0,0")
    node.drag((500, 500), (700, 200))
    first = [tuple(map(float, pair.split(","))) for pair in node.values()["points"].split()]
    assert len(first) == 3
    assert close(first[1], (700, 200))
    assert node.sent()["points"] == node.values()["points"]
    page.page.mouse.dblclick(*node.place(first[1]))
    page.page.wait_for_timeout(300)
    assert node.values()["points"] == "1000,1000 0,0"


def test_a_double_click_on_a_preset_draws_from_it(page: NodePage) -> None:
    node = page.add()
    node.preset("caption first")
    assert page.renderer == "classic" or "joint" in node.texts()
    page.page.mouse.dblclick(*node.place((750, 500)))
    page.page.wait_for_timeout(300)
    values = node.values()
    assert page.renderer == "classic" or "drawn" in node.texts()
    assert values["task"] == "drawn"
    assert len(values["points"].split()) == 4
    assert values["points"].endswith("500,0 0,0")


def test_speeds_are_dragged_and_typed(page: NodePage) -> None:
    node = page.add()
    node.preset("joint")
    node.drag((500, 500), (750, 500))
    values = node.values()
    assert values["speed_image"] == 1
    assert values["speed_text"] == pytest.approx(2, abs=0.1)
    node.type("task.speed_text", "4")
    corner = node.drawn()[15]
    assert node.values()["speed_text"] == 4
    assert corner[1] == 0
    assert "caption settles first" in node.status()
    assert node.sent()["speed_text"] == 4


def test_typing_moves_the_drawing(page: NodePage) -> None:
    node = page.add()
    node.type("task.start", "400")
    node.type("steps", "5")
    assert node.drawn() == [(400 - 80 * k, 0) for k in range(6)]
    node.preset("drawn")
    node.type("task.points", "1000,1000 250,0 0,0")
    assert (250, 0) in node.drawn()
    node.type("task.points", "1000,1000 500,1000 600,0")
    assert "image noise rises at point 3" in node.status()
    node.type("task.points", "1000,1000 500")
    assert "Point 2 is “500”" in node.status()


def test_a_corner_and_its_end_are_dragged(page: NodePage) -> None:
    node = page.add()
    node.set("task", "through a corner")
    node.drag((500, 500), (200, 800))
    node.drag((0, 0), (0, 300))
    values = node.values()
    assert close((values["image_corner"], values["text_corner"]), (200, 800))
    assert close((values["image_end"], values["text_end"]), (0, 300))
    assert values["image_end"] == 0
    assert "caption keeps noise" in node.status()


def test_undo_and_redo(page: NodePage) -> None:
    node = page.add()
    page.page.mouse.click(900, 850)
    before = node.values()
    node.drag((1000, 0), (500, 0))
    after = node.values()
    assert after["start"] != before["start"]
    page.press("Control+z")
    assert page.until(lambda: node.values() == before)
    assert node.drawn()[0] == (1000, 0)
    page.page.mouse.click(900, 850)  # changes nothing, so what was undone can still be done again
    page.press("Control+y")
    assert page.until(lambda: node.values() == after)
    assert close(node.drawn()[0], (500, 0))


def test_the_keyboard_moves_adds_and_removes_points(page: NodePage) -> None:
    node = page.add()
    node.preset("drawn")
    node.set("task.points", "1000,1000 500,500 0,0")
    node.handle(0).focus()
    page.press("Tab")
    page.press("ArrowLeft")
    page.press("Shift+ArrowDown")
    page.press("Alt+ArrowUp")
    assert node.values()["points"] == "1000,1000 490,401 0,0"
    page.press("Insert")
    assert node.values()["points"] == "1000,1000 490,401 245,201 0,0"
    page.press("Delete")
    assert node.values()["points"] == "1000,1000 490,401 0,0"
    assert page.page.evaluate("() => app.graph._nodes.length") == 1
    page.press("Shift+ArrowRight")
    assert node.values()["points"] == "1000,1000 590,401 0,0"
    assert node.handle(1).get_attribute("aria-valuetext") == "image 590 · caption 401"


def test_touch_and_zoom(page: NodePage) -> None:
    node = page.add()
    page.zoom(0.6, (200, 150))
    node.touch((1000, 0), (800, 0), (400, 0))
    assert node.values()["start"] == pytest.approx(400, abs=2 * CLOSE)
    page.zoom(1.3, (-100, -60))
    node.drag((node.values()["start"], 0), (700, 0))
    assert node.values()["start"] == pytest.approx(700, abs=CLOSE)


def test_hovering_tells_the_levels_and_what_happens(page: NodePage) -> None:
    node = page.add()
    node.preset("caption first")
    page.page.mouse.move(*node.place((800, 600)))
    page.page.wait_for_timeout(200)
    heading, text = node.status().splitlines()
    image, caption, step, steps = map(int, re.findall(r"\d+", heading))
    assert close((image, caption), (800, 600))
    assert (step, steps) in ((4, 20), (5, 20))
    assert text == "Both are denoised, the caption faster."
    page.page.mouse.move(*node.place((200, 0)))
    page.page.wait_for_timeout(200)
    assert node.status().splitlines()[1] == "The image is denoised and follows the caption."
    page.page.mouse.move(20, 900)
    page.page.wait_for_timeout(200)
    assert node.status() == "The caption settles first, and the image follows it."


def test_copies_and_reloads_keep_the_path(page: NodePage) -> None:
    node = page.add()
    node.preset("drawn")
    node.set("task.points", "1000,1000 300,600 0,0")
    form = page.page.evaluate("() => app.graph.serialize()")
    assert form["nodes"][0]["widgets_values"][:4] == ["drawn", "1000,1000 300,600 0,0", 20, "uniform"]
    page.page.evaluate("(id) => { app.canvas.selectNode(app.graph.getNodeById(id)); app.canvas.canvas.focus(); }", node.id)
    page.page.evaluate("() => { app.canvas.copyToClipboard(); app.graph._nodes[0].pos = [150, 120]; }")
    page.page.evaluate("() => app.canvas.pasteFromClipboard({position: [700, 120]})")
    page.page.wait_for_timeout(900)
    copied = [n for n in page.page.evaluate("() => app.graph._nodes.map((n) => n.id)") if str(n) != str(node.id)]
    assert len(copied) == 1
    other = type(node)(page, copied[0])
    assert other.values() == node.values()
    assert other.drawn() == node.drawn()
    other.set("task.points", "1000,1000 600,300 0,0")
    assert other.drawn() != node.drawn()

    page.front_end.open_workflow(form)
    again = type(node)(page, page.page.evaluate("() => app.graph._nodes[0].id"))
    assert again.values()["points"] == "1000,1000 300,600 0,0"
    assert (300, 600) in again.drawn()


def test_a_loaded_node_shows_its_task(page: NodePage) -> None:
    node = page.add()
    node.preset("joint")
    again = page.reopen(node)
    assert again.values()["task"] == "joint"
    if page.renderer == "vue":
        assert "joint" in again.texts()
        assert "text to image" not in again.texts()


def test_a_loaded_node_has_its_size(page: NodePage) -> None:
    node = page.add()
    node.resize((430, 820))
    assert node.size() == (430, 820)
    assert page.reopen(node).size() == (430, 820)


def test_one_undo_brings_back_the_task_and_shows_it(page: NodePage) -> None:
    node = page.add()
    page.page.mouse.click(900, 850)
    node.preset("joint")
    assert page.renderer == "classic" or "joint" in node.texts()
    page.page.mouse.click(900, 850)  # changes nothing
    page.press("Control+z")
    assert page.until(lambda: node.values()["task"] == "text to image")
    assert page.renderer == "classic" or "text to image" in node.texts()


def test_a_reloaded_page_has_the_path_and_its_editor(page: NodePage) -> None:
    node = page.add()
    node.preset("drawn")
    node.set("task.points", "1000,1000 0,0")
    node.drag((500, 500), (300, 600))
    values, drawn = node.values(), node.drawn()
    page.page.wait_for_timeout(1500)  # the front end stores the workflow
    page.reload()
    (again,) = page.page.evaluate("() => app.graph._nodes.map((n) => n.id)")
    assert page.known(again).values() == values
    assert page.known(again).drawn() == drawn
    page.known(again).drag((1000, 1000), (800, 900))
    assert close(page.known(again).drawn()[0], (800, 900))
