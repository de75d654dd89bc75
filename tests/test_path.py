"""Noise paths: what is legal, where the constructors go, and the picture."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiffuser.path import SPACINGS, NoisePath, path_points, spaced

STEPS = st.integers(1, 60)
LEVELS = st.floats(0, 1000)


@st.composite
def falling_paths(draw: st.DrawFn) -> NoisePath:
    """Any legal path: two falling sequences of which at least one ends at 0 and at least one moves."""
    points = draw(st.integers(2, 12))
    labels = [sorted(draw(st.lists(LEVELS, min_size=points, max_size=points)), reverse=True) for _ in range(2)]
    clean = draw(st.integers(0, 1))
    labels[clean][-1] = 0.0
    labels[clean][0] = max(labels[clean][0], 1.0)
    return NoisePath(*labels)


@settings(deadline=None)
@given(falling_paths())
def test_every_monotone_curve_to_an_axis_is_a_path(path: NoisePath):
    assert not path.ascending
    assert path.steps == len(path.t_text) - 1
    back = path.reversed()
    assert back.ascending
    assert back.reversed() == path
    assert hash(back.reversed()) == hash(path)


@settings(deadline=None)
@given(STEPS)
def test_tasks_are_the_edges_and_the_diagonal(steps: int):
    down = tuple(1000 * (steps - k) / steps for k in range(steps + 1))
    for path, moves_img, held in (
        (NoisePath.text_to_image(steps), True, 0),
        (NoisePath.image_to_text(steps), False, 0),
        (NoisePath.image(steps), True, 1000),
        (NoisePath.text(steps), False, 1000),
    ):
        moving, level = (path.t_img, path.t_text) if moves_img else (path.t_text, path.t_img)
        assert moving == pytest.approx(down)
        assert set(level) == {held}
        assert path.steps == steps
    joint = NoisePath.joint(steps)
    assert joint.t_img == joint.t_text == pytest.approx(down)


@settings(deadline=None)
@given(
    st.tuples(st.floats(50, 1000), st.floats(50, 1000)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    st.integers(2, 60),
    st.sampled_from(list(SPACINGS)),
)
def test_joint_paths_run_from_start_to_origin_at_any_speeds(start, speeds, steps, spacing):
    path = NoisePath.joint(steps, start=start, speeds=speeds, spacing=spacing)
    assert path.steps == steps
    assert (path.t_img[0], path.t_text[0]) == tuple(round(t, 6) for t in start)  # a path's labels are millionths
    assert (path.t_img[-1], path.t_text[-1]) == (0, 0)


def test_a_modality_of_speed_0_waits_for_the_other():
    path = NoisePath.joint(5, speeds=(0, 1))
    assert path.t_img[:3] == (1000, 1000, 1000)
    assert path.t_text[2:] == (0, 0, 0, 0)
    assert NoisePath.joint(5, speeds=(1, 0)) == NoisePath(path.t_text, path.t_img)
    assert NoisePath.joint(4, start=(600, 800), speeds=(0, 1)).t_img == (600, 600, 600, 300, 0)


def test_speeds_set_the_slope():
    path = NoisePath.joint(10, speeds=(2, 1))
    assert path.t_img[5] == 0
    assert path.t_text[5] == pytest.approx(500)
    assert path.t_text[-1] == 0


@settings(deadline=None)
@given(st.floats(2, 1000), st.floats(0, 1), STEPS, st.sampled_from(list(SPACINGS)))
def test_spacings_fall_strictly_between_exact_ends(start: float, share: float, steps: int, spacing: str):
    end = share * (start - 1.5)
    labels = spaced(start, end, steps, spacing)
    assert len(labels) == steps + 1
    assert (labels[0], labels[-1]) == (start, end)
    assert all(a > b for a, b in itertools.pairwise(labels))


@settings(deadline=None)
@given(st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=5), st.integers(0, 30))
def test_corners_are_points_of_the_path(inner, extra):
    inner = sorted({(1000.0, 1000.0), *inner}, key=sum, reverse=True)
    corners = [inner[0]]
    for img, text in inner[1:]:
        corners.append((min(img, corners[-1][0]), min(text, corners[-1][1])))
    corners.append((0.0, 0.0))
    path = NoisePath.through(*corners, steps=len(corners) - 1 + extra)
    assert path.steps == len(corners) - 1 + extra
    corners = [(round(img, 6), round(text, 6)) for img, text in corners]
    assert set(corners) <= set(zip(path.t_img, path.t_text, strict=True))


def test_partial_start_and_held_condition():
    path = NoisePath.text_to_image(4, start=600, hold=200)
    assert path.t_img == pytest.approx((600, 450, 300, 150, 0))
    assert set(path.t_text) == {200}


def test_the_authors_end_at_label_1_counts_as_clean():
    assert NoisePath([1000, 1], [1000, 1]).steps == 1


@pytest.mark.parametrize(
    ("t_img", "t_text", "words"),
    [
        ([1000, 0], [0], "one length"),
        ([1000], [0], "at least 2 points"),
        ([1000.5, 0], [0, 0], "labels run from 0"),
        ([1000, -1], [0, 0], "labels run from 0"),
        ([math.nan, 0], [0, 0], "labels run from 0"),
        ([1000, 500, 600, 0], [0] * 4, "monotone"),
        ([1000, 0], [0, 1000], "monotone"),
        ([500, 500], [0, 0], "does not move"),
        ([1000, 500], [1000, 400], "at 0"),
        ([500, 1000], [400, 1000], "at 0"),
    ],
)
def test_illegal_paths_say_why(t_img, t_text, words):
    with pytest.raises(ValueError, match=words):
        NoisePath(t_img, t_text)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None])
def test_steps_must_be_a_positive_whole_number(steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        NoisePath.joint(steps)


def test_constructors_say_what_is_wrong():
    with pytest.raises(ValueError, match="one for each straight part"):
        NoisePath.through((1000, 1000), (0, 1000), (0, 0), steps=1)
    with pytest.raises(ValueError, match="two corners"):
        NoisePath.through((1000, 0), steps=3)
    with pytest.raises(ValueError, match="Unknown spacing"):
        NoisePath.joint(3, spacing="cosine")
    for speeds in ((0, 0), (-1, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="speeds"):
            NoisePath.joint(3, speeds=speeds)


@pytest.mark.parametrize("size", [64, 200])
def test_picture_shows_the_curve_where_it_runs(size: int):
    picture = NoisePath.text_to_image(5).picture(size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))

    def redness(corners: tuple[int, int]) -> int:
        x, y = (round(size * (0.14 + 0.72 * c)) for c in corners)
        return max(r - g for a in (-1, 0, 1) for b in (-1, 0, 1) for r, g, _ in [picture.getpixel((x + a, y + b))])

    assert redness((0.5, 1)) > 100  # the bottom edge: the text clean
    assert redness((0.5, 0)) < 30
    with pytest.raises(ValueError, match="64 pixels"):
        NoisePath.joint(3).picture(10)


@settings(deadline=None)
@given(falling_paths(), st.integers(1, 60), st.sampled_from(list(SPACINGS)))
def test_drawn_points_are_kept_where_the_steps_allow(curve: NoisePath, steps: int, spacing: str):
    drawn = list(zip(curve.t_img, curve.t_text, strict=True))
    path = NoisePath.from_points(drawn, steps, spacing)
    assert path.steps == steps
    assert (path.t_img[0], path.t_text[0]) == drawn[0]
    assert (path.t_img[-1], path.t_text[-1]) == drawn[-1]
    if steps >= len(path_points(drawn)) - 1:
        assert set(drawn) <= set(zip(path.t_img, path.t_text, strict=True))
    assert NoisePath.from_points(" ".join(f"{x!r},{y!r}" for x, y in drawn), steps, spacing) == path


def test_points_as_text_are_the_same_path_as_numbers():
    path = NoisePath.from_points("1000,1000  400,0\n0,0", 20)
    assert path == NoisePath.through((1000, 1000), (400, 0), (0, 0), steps=20)
    assert path == NoisePath.from_points([(1000, 1000), (1000, 1000), [400, 0], (0, 0)], 20)
    assert path == NoisePath.from_points("1000,1000; 400,0; 0,0;", 20)


@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_lines_below_label_1_have_finite_steps(spacing: str):
    assert NoisePath.text_to_image(2, start=1, spacing=spacing).t_img == (1, 0.5, 0)
    assert NoisePath.from_points("1000,0 0.5,0 0,0", 4, spacing).t_img[-2:] == (0.5, 0)


def test_fewer_steps_than_lines_spread_over_the_whole_curve():
    path = NoisePath.from_points([(1000, 1000), (0, 1000), (0, 500), (0, 0)], 2)
    assert (path.t_img, path.t_text) == ((1000, 0, 0), (1000, 1000, 0))
    late = NoisePath.from_points("1000,900 800,800 500,300 200,100 0,0", 3, "logsnr")
    assert late.steps == 3
    assert late.t_img[1] < path.t_img[0]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ("", "at least 2 different points.*here are 0"),
        ("1000,1000", "at least 2 different points.*here are 1"),
        ("0,0 0,0", "at least 2 different points.*here are 1"),
        ("1000,1000 400 0,0", "Point 2 is '400'; write image noise,caption noise"),
        ("1000,1000 a,b", "Point 2 is 'a,b'"),
        ("1000,1000,0 0,0", "Point 1 is '1000,1000,0'"),
        ([(1000, 1000), None], "Point 2 is None"),
        ("1001,0 0,0", "image noise of point 1 is 1001; it must be 0"),
        ("1000,nan 0,0", "caption noise of point 1 is nan"),
        ("1000,500 600,600 0,0", "caption noise rises from 500 to 600 at point 2"),
        ("0,0 1000,0", "image noise rises from 0 to 1000 at point 2"),
        ("1000,1000 400,300", "last point is 400,300: image and caption both end noisy"),
    ],
)
def test_points_that_are_no_path_say_which_and_why(points, words):
    with pytest.raises(ValueError, match=words):
        NoisePath.from_points(points, 10)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        NoisePath.from_points("1000,0 0,0", 0)
