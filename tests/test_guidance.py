"""Guidance: which evaluations are made, in how many forwards, and what becomes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unidiffuser.guidance import MOST_PEAK, MOST_SPREAD, Guidance, overshoot_warning, predict
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, sample

SHAPES = {"img": (4, 6, 4), "clip_img": (1, 5), "text": (3, 2)}
BATCH = 2


def streams(seed: int = 0, batch: int = BATCH) -> Streams:
    g = torch.Generator().manual_seed(seed)
    return Streams(**{name: torch.randn(batch, *shape, generator=g) for name, shape in SHAPES.items()})


class Net:
    """A network of which every output depends on all inputs of its item; it writes down how it was called."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor, data_type: Tensor,
                 heads: tuple[str, ...] = tuple(SHAPES)) -> tuple[Tensor | None, ...]:  # fmt: skip
        self.calls.append({"img": img, "text": text, "t_img": t_img, "t_text": t_text, "kind": data_type, "heads": heads})
        given = dict(zip(SHAPES, (img, clip_img, text), strict=True))
        mood = sum(value.flatten(1).mean(1) for value in given.values()) + t_img / 1000 - t_text / 3000 + data_type
        return tuple(
            torch.sin(given[name] + mood.reshape(-1, *[1] * len(SHAPES[name]))) if name in heads else None for name in SHAPES
        )


class Noise:
    """Fresh noise, remembered in the order of drawing."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(9)
        self.drawn: list[tuple[str, Tensor]] = []

    def __call__(self, name: str) -> Tensor:
        self.drawn.append((name, torch.randn(BATCH, *SHAPES[name], generator=self.generator)))
        return self.drawn[-1][1]


def by_hand(x: Streams, t_img: float, t_text: float) -> Streams:
    labels = [torch.full((BATCH,), float(t)) for t in (t_img, t_text)]
    return Streams(*Net()(x.need("img"), x.need("clip_img"), x.need("text"), *labels, torch.ones(BATCH)))


def test_joint_guidance_is_the_papers_combination_of_three_evaluations():
    net, noise, x, s = Net(), Noise(), streams(), 2.5
    eps = predict(net, x, 700, 700, moving=("img", "text"), guidance=Guidance(s + 1, s + 1), noise=noise)
    fresh = dict(noise.drawn)
    assert sorted(fresh) == sorted(SHAPES)
    both = by_hand(x, 700, 700)
    without_text = by_hand(x.replace(text=fresh["text"]), 700, 1000)
    without_image = by_hand(x.replace(img=fresh["img"], clip_img=fresh["clip_img"]), 1000, 700)
    for name in SHAPES:
        other = without_image if name == "text" else without_text
        torch.testing.assert_close(eps.need(name), (1 + s) * both.need(name) - s * other.need(name))
    assert len(net.calls) == 1
    assert len(net.calls[0]["img"]) == 3 * BATCH


def test_conditional_guidance_with_a_scale_for_each_modality():
    net, noise, x = Net(), Noise(), streams()
    eps = predict(net, x, 0, 400, moving=("text",), guidance=Guidance(img=9.0, text=3.0), noise=noise)
    x_n = x.replace(**dict(noise.drawn))
    torch.testing.assert_close(eps.need("text"), 3 * by_hand(x, 0, 400).need("text") - 2 * by_hand(x_n, 1000, 400).need("text"))
    assert (eps.img, eps.clip_img) == (None, None)
    assert list(net.calls[0]["heads"]) == ["text"]
    assert net.calls[0]["t_img"].tolist() == [0, 0, 1000, 1000]
    assert net.calls[0]["t_text"].tolist() == [400] * 4


def test_empty_prompt_is_a_clean_text_of_the_image_only():
    net, noise, x, empty = Net(), Noise(), streams(), torch.full((1, *SHAPES["text"]), 0.25)
    rule = Guidance.of(3.0, empty)
    eps = predict(net, x, 300, 0, moving=("img",), guidance=rule, noise=noise)
    assert noise.drawn == []
    away = by_hand(x.replace(text=empty.expand(BATCH, -1, -1)), 300, 0)
    for name in ("img", "clip_img"):
        torch.testing.assert_close(eps.need(name), 3 * by_hand(x, 300, 0).need(name) - 2 * away.need(name))
    predict(net, x, 300, 300, moving=("img", "text"), guidance=rule, noise=noise)
    assert net.calls[1]["t_text"].tolist() == [300, 300, 0, 0, 300, 300]
    assert net.calls[1]["t_img"].tolist() == [300, 300, 300, 300, 1000, 1000]


PATHS = {
    "text_to_image": (NoisePath.text_to_image, 2, {"img", "clip_img"}),
    "image_to_text": (NoisePath.image_to_text, 2, {"text"}),
    "joint": (NoisePath.joint, 3, set(SHAPES)),
    "image": (NoisePath.image, 1, {"img", "clip_img"}),
    "text": (NoisePath.text, 1, {"text"}),
}


@pytest.mark.parametrize("task", PATHS)
def test_one_forward_a_step_holds_what_the_path_needs(task):
    make, evaluations, heads = PATHS[task]
    for guidance, expected in ((1.0, 1), (4.0, evaluations)):
        net = Net()
        sample(net, make(4), streams(), guidance=guidance, generator=torch.Generator().manual_seed(0))
        assert [len(call["img"]) for call in net.calls] == [expected * BATCH] * 4
        assert all(set(call["heads"]) == heads for call in net.calls)


def test_a_guided_pair_pays_only_for_the_modality_that_is_guided():
    net = Net()
    sample(net, NoisePath.joint(3), streams(), guidance=(5.0, 1.0))
    assert [call["t_text"].tolist()[BATCH:] for call in net.calls] == [[1000] * BATCH] * 3


def test_a_condition_that_comes_to_rest_is_guided_like_a_clean_one():
    """Text clean first: joint guidance on the way, then text-to-image guidance on the bottom edge."""
    net = Net()
    sample(net, NoisePath.joint(4, speeds=(1, 2)), streams(), guidance=2.0)
    assert [len(call["img"]) // BATCH for call in net.calls] == [3, 3, 2, 2]
    assert net.calls[-1]["t_text"].tolist() == [0] * BATCH + [1000] * BATCH


def test_outside_its_interval_guidance_costs_nothing():
    net = Net()
    sample(net, NoisePath.text_to_image(5), streams(), guidance=4.0, guidance_interval=(300, 800))
    assert [(int(c["t_img"][0]), len(c["img"]) // BATCH) for c in net.calls] == [
        (1000, 1), (800, 2), (600, 2), (400, 2), (200, 1)]  # fmt: skip


def test_a_marginal_stream_is_drawn_afresh_at_every_evaluation():
    net = Net()
    given = streams()
    out = sample(net, NoisePath.image(3), given, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([call["text"] for call in net.calls])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])
    assert not torch.allclose(seen[0][0], seen[0][1])
    assert torch.equal(out.need("text"), given.need("text"))


def test_the_data_type_reaches_every_branch():
    net = Net()
    sample(net, NoisePath.joint(1), streams(), guidance=2.0, data_type=torch.tensor([0, 1]))
    assert net.calls[0]["kind"].tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance": (1.0, math.nan)}, "text guidance"),
        ({"guidance": (1.0, 2.0, 3.0)}, "pair"),
        ({"guidance": 2.0, "negative": torch.zeros(3, 2)}, "negative must be"),
        ({"guidance": 2.0, "negative": torch.zeros(1, 4, 2)}, "an item of text"),
        ({"guidance": 2.0, "guidance_interval": (800, 300)}, "low <= high"),
    ],
)
def test_bad_guidance_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        sample(Net(), NoisePath.text_to_image(2), streams(), **arguments)


def test_latents_outside_the_range_of_pictures_are_counted_and_told() -> None:
    latents = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    scales = torch.tensor([1.0, 1.6, 3.0, 5.0]).view(-1, 1, 1, 1)
    assert overshoot_warning(latents * MOST_SPREAD * 0.9) is None
    assert overshoot_warning(latents[:0]) is None
    told = overshoot_warning(latents * scales) or ""
    assert told.startswith("2 of 4 images overshoot the range of pictures (spread 5.0 of at most 2, peak 15.0 of at most 8)")
    latents[0, 0, 0, 0] = -MOST_PEAK - 1  # a speck
    told = overshoot_warning(latents[:1]) or ""
    assert told.startswith("The image overshoots the range of pictures (spread 1.0 of at most 2, peak 9.0 of at most 8)")
