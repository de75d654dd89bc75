"""The editor of noise paths in web/js draws what the library samples. Its modules run in Node.js, without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unidiffuser.path import SPACINGS, NoisePath, path_points

EDITOR = Path(__file__).parents[1] / "web/js/noise_path"
ANSWER = """
import { pathOf, parsePoints } from "%(folder)s/paths.js";
import { drag, handlesOf, insertPoint, removePoint } from "%(folder)s/handles.js";
import { createInterface } from "node:readline";
const calls = {
    path: (values) => pathOf(values),
    parse: (text) => parsePoints(text),
    drags: ({ values, moves }) => moves.map(([pick, target, exact]) => {
        const handles = handlesOf(values);
        const { changes, reason } = drag(values, handles[pick %% handles.length].id, target, exact);
        Object.assign(values, changes);
        return { values: { ...values }, reason, error: pathOf(values).error };
    }),
    insert: ({ values, target }) => insertPoint(values, target),
    remove: ({ values, id }) => removePoint(values, id),
};
for await (const line of createInterface({ input: process.stdin })) {
    const [name, input] = JSON.parse(line);
    console.log(JSON.stringify(calls[name](input)));
}
"""
COMMON = {"steps": st.integers(1, 40), "spacing": st.sampled_from(list(SPACINGS))}
WHOLE = st.integers(0, 1000).map(float)
SPEED = st.integers(1, 400).map(lambda k: k / 100)


class Editor:
    """The editor's modules in a Node.js process; each call is one line of JSON."""

    def __init__(self, node: str):
        script = ANSWER % {"folder": EDITOR.as_uri()}
        self.process = subprocess.Popen(
            [node, "--input-type=module", "-e", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, name: str, value: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, value]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def editor():
    node = shutil.which("node")
    if node is None:
        pytest.skip("NO NODE.JS: the editor's modules are not run")
    editor = Editor(node)
    yield editor
    editor.process.terminate()
    editor.process.wait()


def assert_same(drawn: dict[str, Any], path: NoisePath) -> None:
    assert drawn["error"] is None
    assert len(drawn["points"]) == path.steps + 1
    for point, expected in zip(drawn["points"], zip(path.t_img, path.t_text, strict=True), strict=True):
        assert point == pytest.approx(expected, abs=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({**COMMON, "start": st.integers(1, 1000), "hold": WHOLE}))
def test_conditional_and_marginal_tasks(editor, values):
    steps, spacing, start, hold = (values[name] for name in ("steps", "spacing", "start", "hold"))
    settings_ = {"steps": steps, "start": start, "spacing": spacing}
    for task, path in {
        "text to image": NoisePath.text_to_image(hold=hold, **settings_),
        "image to text": NoisePath.image_to_text(hold=hold, **settings_),
        "image": NoisePath.image(**settings_),
        "text": NoisePath.text(**settings_),
    }.items():
        assert_same(editor("path", {**values, "task": task}), path)


@settings(deadline=None, max_examples=100)
@given(st.fixed_dictionaries({**COMMON, "image_start": WHOLE, "text_start": WHOLE, "speed_image": SPEED, "speed_text": SPEED}))
def test_joint(editor, values):
    drawn = editor("path", {**values, "task": "joint"})
    start, speeds = (values["image_start"], values["text_start"]), (values["speed_image"], values["speed_text"])
    try:
        path = NoisePath.joint(values["steps"], start=start, speeds=speeds, spacing=values["spacing"])
    except ValueError:
        assert drawn["error"] is not None
    else:
        assert_same(drawn, path)


@settings(deadline=None, max_examples=150)
@given(st.fixed_dictionaries(COMMON), st.lists(st.tuples(WHOLE, WHOLE), max_size=8), st.booleans())
def test_drawn_points(editor, values, points, falling):
    if falling:
        levels = [sorted(axis, reverse=True) for axis in zip(*points, strict=True)]
        points = [*zip(*levels, strict=True), (0.0, 0.0)]
    text = " ".join(f"{x:g},{y:g}" for x, y in points)
    drawn = editor("path", {**values, "task": "drawn", "points": text})
    try:
        path = NoisePath.from_points(text, values["steps"], values["spacing"])
    except ValueError:
        assert drawn["error"] is not None
    else:
        assert_same(drawn, path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "short"),
        ("1000,1000 400 0,0", "unreadable"),
        ("1000,1000 , 0,0", "unreadable"),
        ("1001,0 0,0", "outside"),
        ("1000,500 600,600 0,0", "textRises"),
        ("0,0 1000,0", "imageRises"),
        ("1000,1000 400,300", "noisyEnd"),
    ],
)
def test_texts_that_are_no_path_are_refused_by_both(editor, text, key):
    assert editor("parse", text)["error"]["key"] == key
    with pytest.raises(ValueError):  # noqa: PT011 (the texts are tested with the library)
        path_points(text)


TASKS = [
    {"task": "text to image", "start": 1000, "hold": 0},
    {"task": "image to text", "start": 700, "hold": 100},
    {"task": "image", "start": 1000},
    {"task": "text", "start": 400},
    {"task": "joint", "image_start": 1000, "text_start": 800, "speed_image": 1, "speed_text": 2},
    {
        "task": "through a corner",
        "image_start": 1000,
        "text_start": 1000,
        "image_corner": 500,
        "text_corner": 300,
        "image_end": 0,
        "text_end": 0,
    },
    {"task": "drawn", "points": "1000,1000 800,500 300,300 0,0"},
]
MOVE = st.tuples(st.integers(0, 9), st.tuples(st.floats(-300, 1300), st.floats(-300, 1300)), st.booleans())


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(TASKS), st.lists(MOVE, max_size=12))
@example({"task": "drawn", "points": "1000,1000 0,0"}, [(0, (0.0, 0.0), False)] * 3 + [(0, (0.0, 12.0), False)])
def test_whatever_is_dragged_stays_a_path(editor, values, moves):
    """Only points dragged onto one another are no path: nothing is left to denoise between them."""
    for state in editor("drags", {"values": {**values, "steps": 20, "spacing": "uniform"}, "moves": moves}):
        assert state["error"] is None or (state["error"]["key"] in ("short", "still") and state["reason"])


def test_points_are_inserted_and_removed(editor):
    values = {"task": "joint", "image_start": 1000, "text_start": 1000, "speed_image": 1, "speed_text": 2, "steps": 20}
    added = editor("insert", {"values": values, "target": [760, 490]})
    assert added == {"changes": {"task": "drawn", "points": "1000,1000 748,496 500,0 0,0"}, "id": "1"}
    drawn = {"task": "drawn", "points": "1000,1000 400,300 0,0"}
    assert editor("remove", {"values": drawn, "id": "1"})["changes"] == {"points": "1000,1000 0,0"}
    assert editor("remove", {"values": drawn, "id": "2"}) == {"changes": {}, "reason": "oneClean"}
    assert editor("remove", {"values": {**drawn, "points": "5,0 0,0"}, "id": "1"})["reason"] == "twoPoints"
