"""UniDiffuser Noise Path in a real server: drawn paths, curves, and what it says of values that are no path."""

from __future__ import annotations

from typing import Any

import pytest
from host_server import HostServer
from prompts import Graph

DRAWN = "1000,1000 400,0 0,0"
RISING = {"points": [[0, 0], [0.5, 0.1], [1, 1]], "interpolation": "linear"}


def run_path(server: HostServer, **inputs: Any) -> list[list[float]]:
    graph = Graph()
    graph.add("UniDiffuserNoisePath", **{"steps": 10, "spacing": "uniform", **inputs})
    path = list(graph.prompt)[-1]
    graph.add("PreviewAny", source=[path, 1])
    return server.run(graph.prompt)[path]["unidiffuser_path"]


def test_a_drawn_path_runs_through_its_points(server: HostServer) -> None:
    points = run_path(server, task="drawn", **{"task.points": DRAWN})
    assert len(points) == 11
    assert [points[0], points[-1]] == [[1000, 1000], [0, 0]]
    assert [400, 0] in points


def test_a_drawn_path_gives_the_pixels_of_the_same_corners(server: HostServer) -> None:
    graph = Graph()
    ends = {"image_start": 1000, "text_start": 1000, "image_corner": 400, "text_corner": 0, "image_end": 0, "text_end": 0}
    shown = [
        graph.show(graph.sampler(graph.add("UniDiffuserNoisePath", steps=4, spacing="uniform", **task)(), seed=3)())
        for task in (
            {"task": "drawn", "task.points": DRAWN},
            {"task": "through a corner", **{f"task.{name}": level for name, level in ends.items()}},
        )
    ]
    found = server.run(graph.prompt)
    drawn, corners = (server.file(found[preview]["images"][0]) for preview in shown)
    assert len(drawn) > 100
    assert drawn == corners


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"task": "drawn", "task.points": "1000,1000 400"}, r"'points': Point 2 is '400'; write image noise,caption noise"),
        ({"task": "drawn", "task.points": "1000,1000 400,300"}, r"'points': The last point is 400,300.*both end noisy"),
        ({"task": "drawn", "task.points": "400,300 500,0 0,0"}, r"'points': The image noise rises from 400 to 500 at point 2"),
        ({"task": "text to image", "task.start": 0, "task.hold": 0}, r"'start' is 0: nothing is left to denoise"),
        (
            {"task": "joint", "task.image_start": 0, "task.text_start": 0, "task.speed_image": 1, "task.speed_text": 1},
            r"'image_start' and 'text_start' are 0",
        ),
    ],
)
def test_values_that_are_no_path_are_named(server: HostServer, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run_path(server, **inputs)


@pytest.mark.parametrize(
    ("start", "corner", "end", "words"),
    [
        ((400, 300), (200, 200), (100, 50), r"'image_end' is 100 and 'text_end' is 50: both would end noisy"),
        ((400, 300), (500, 200), (0, 0), r"'image_corner' is 500, above 'image_start' \(400\)"),
        ((400, 300), (200, 100), (0, 200), r"'text_end' is 200, above 'text_corner' \(100\)"),
        ((0, 0), (0, 0), (0, 0), r"start, corner and end are the same point"),
    ],
)
def test_corners_that_are_no_path_are_named(server: HostServer, start, corner, end, words) -> None:
    places = {"start": start, "corner": corner, "end": end}
    levels = {f"task.{what}_{name}": place[k] for name, place in places.items() for k, what in enumerate(("image", "text"))}
    with pytest.raises(RuntimeError, match=words):
        run_path(server, task="through a corner", **levels)


def test_a_path_that_leaves_one_noisy_ends_there(server: HostServer) -> None:
    points = run_path(server, task="drawn", **{"task.points": "400,300 200,300 0,250"})
    assert [points[0], points[-1]] == [[400, 300], [0, 250]]


def test_a_curve_of_the_host_is_the_caption_noise_over_the_image_noise(server: HostServer) -> None:
    if "CurveEditor" not in server.get("/object_info"):
        pytest.skip("this host has no curves")

    def prompt(curve: dict[str, Any]) -> tuple[dict[str, Any], str]:
        graph = Graph()
        link = graph.add("CurveEditor", curve=curve)()
        path = graph.add(
            "UniDiffuserNoisePath", task="drawn", steps=8, spacing="uniform", **{"task.points": DRAWN, "task.curve": link}
        )
        graph.add("PreviewAny", source=path(1))
        return graph.prompt, path()[0]

    graph, path = prompt(RISING)
    points = server.run(graph)[path]["unidiffuser_path"]
    assert len(points) == 9
    assert [points[0], points[-1]] == [[1000, 1000], [0, 0]]
    for image, caption in points:
        assert caption == pytest.approx(max(0.2 * image, 100 + 1.8 * (image - 500)), abs=8)

    graph, _ = prompt({"points": [[0, 0], [0.5, 1], [1, 0.2]], "interpolation": "linear"})
    with pytest.raises(RuntimeError, match=r"'curve': it falls near 0\.\d+, so the caption would get noisier"):
        server.run(graph)
