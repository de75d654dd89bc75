"""Each measure against a number known from elsewhere: Gaussians in closed form, captions counted by hand."""

from __future__ import annotations

import importlib
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiffuser.evaluation.caption_metrics import bleu4, cider, exact, words
from unidiffuser.evaluation.clip_score import clip_scores
from unidiffuser.evaluation.frechet import fid, frechet_distance, gaussian, kid
from unidiffuser.evaluation.measures import memorisation_results
from unidiffuser.evaluation.metrics import psnr, success_rate, wilson
from unidiffuser.evaluation.neighbours import mean_distance, nearest_distances
from unidiffuser.evaluation.optional import require
from unidiffuser.evaluation.parts import Outputs
from unidiffuser.evaluation.retrieval import network_scores, recall
from unidiffuser.media.images import to_tensor
from unidiffuser.streams import Streams

# FID and KID


def test_frechet_distance_of_gaussians_whose_covariances_commute_is_the_closed_form() -> None:
    """|a - b|^2 + sum of (sqrt(eigenvalue of A) - sqrt(eigenvalue of B))^2 in a shared basis."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0, 4, 6), rng.uniform(0, 4, 6)
    mean_a, mean_b = rng.standard_normal(6), rng.standard_normal(6)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(mean_a, basis @ np.diag(a) @ basis.T, mean_b, basis @ np.diag(b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute_is_that_of_two_by_two_matrices() -> None:
    """tr (A B)^(1/2) of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det AB)), from the characteristic polynomial."""
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2.0 * math.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)


def test_fid_of_samples_nears_that_of_their_gaussians() -> None:
    rng = np.random.default_rng(1)
    real, made = rng.standard_normal((40_000, 3)), rng.standard_normal((40_000, 3)) * 2.0 + [1.0, 0.0, 0.0]
    assert fid(real, made) == pytest.approx(1.0 + 3 * (2.0 - 1.0) ** 2, rel=0.03)


def test_fid_is_zero_for_equal_sets_and_lives_with_fewer_pictures_than_features() -> None:
    few = np.random.default_rng(2).standard_normal((10, 64))
    assert fid(few, few) == pytest.approx(0.0, abs=1e-6)
    assert fid(few, few + 3.0) == pytest.approx(64 * 9.0, rel=1e-6)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 8))
def test_fid_does_not_mind_order_or_rotation(seed: int, count: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((count, width)), rng.standard_normal((count, width)) + 1.0
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-6, abs=1e-6)
    assert fid(a @ turn, rng.permutation(b) @ turn) == pytest.approx(fid(a, b), rel=1e-6, abs=1e-6)


def test_gaussian_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two or more"):
        gaussian(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="NaN"):
        gaussian(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="one extractor"):
        fid(np.zeros((3, 4)), np.zeros((3, 5)))


def test_kid_is_the_unbiased_discrepancy_written_out() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.array([[2.0, 1.0], [0.0, 0.0], [-1.0, 1.0]])

    def k(a: Any, b: Any) -> float:
        return float((a @ b / 2 + 1) ** 3)

    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(3) for j in range(3) if i != j) / 6
    across = sum(k(a, b) for a in x for b in y) / 9
    assert kid(x, y)[0] == pytest.approx(within - 2 * across)


def test_kid_of_one_distribution_is_about_nothing_and_repeats() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((600, 4)), rng.standard_normal((600, 4))
    value, spread = kid(a, b, subsets=20, size=200)
    assert abs(value) < 3 * spread
    assert kid(a, b, subsets=20, size=200) == (value, spread)
    assert kid(a, b + 1.0, subsets=20, size=200)[0] > 1.0


# Captions


def test_words_are_split_as_the_challenge_splits_plain_ones() -> None:
    assert (
        words("A dog, isn't it?  It's the man's well-known T-shirt.") == "a dog is n't it it 's the man 's well-known t-shirt"
    )
    assert words("!?") == ""


def test_exact_is_the_same_letters_as_one_reference() -> None:
    assert exact(["red apple ", "Red apple", "pear"], [["a", "red apple"], ["red apple"], ["pear", "b"]]) == [True, False, True]


def test_bleu_of_hand_made_captions() -> None:
    """Counted by hand: 1- to 4-gram precisions 6/7, 4/6, 2/5, 1/4, no brevity penalty."""
    made, real = "the cat sat on the mat today", "the cat is on the mat today"
    precisions = [6 / 7, 4 / 6, 2 / 5, 1 / 4]
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert bleu4([made], [[real]]) == pytest.approx(expected, rel=1e-6)


def test_bleu_penalises_short_captions_and_takes_the_nearest_reference() -> None:
    """Every n-gram is right; 4 words against the nearest reference of 5: exp(1 - 5/4)."""
    assert bleu4(["a b c d"], [["a b c d e", "a b c d e f g h"]]) == pytest.approx(100 * math.exp(1 - 5 / 4), rel=1e-6)
    assert bleu4(["a b c d", "e f g h"], [["a b c d"], ["x", "e f g h"]]) == pytest.approx(100.0)
    assert bleu4(["x y z w"], [["a b c d"]]) == 0.0


def test_cider_of_hand_made_captions() -> None:
    """Two pictures of one word each, so only 1-grams count: cosine 1 for the right one, 0 for the wrong; a quarter of 10."""
    assert cider(["cat", "bird"], [["cat"], ["dog"]]) == pytest.approx(10 * (1 / 4) / 2, rel=1e-6)
    # Words of every reference weigh log(2 / 2) = 0, so a caption of such words alone says nothing.
    assert cider(["a", "a"], [["a cat"], ["a dog"]]) == pytest.approx(0.0, abs=1e-9)
    same = ["one two three four five", "six seven eight nine ten"]
    assert cider(same, [[c] for c in same]) == pytest.approx(10.0, rel=1e-6)


def test_captions_without_references_are_refused() -> None:
    for captions, references in [([], []), (["a"], []), (["a"], [[]])]:
        with pytest.raises(ValueError, match="references"):
            exact(captions, references)
    with pytest.raises(ValueError, match="two or more"):
        cider(["a"], [["a"]])


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r'sacrebleu.*pip install "unidiffuser\[evaluate\]"'):
        require("sacrebleu.metrics")


# Retrieval, neighbours, CLIP


def test_recall_both_ways_from_scores_with_known_ranks() -> None:
    scores = np.array([[9.0, 1.0, 2.0], [8.0, 3.0, 2.0], [7.0, 6.0, 5.0]])  # rows 0, 1, 2 rank their own 0th, 1st, 2nd
    found = recall(scores, ["a", "b", "c"], ks=(1, 2))
    assert found["image to text R@1"] == [True, False, False]
    assert found["image to text R@2"] == [True, True, False]
    assert found["text to image R@1"] == [True, False, True]
    assert found["text to image R@2"] == [True, True, True]


def test_recall_takes_equal_captions_for_one_and_ties_for_failures() -> None:
    assert recall(np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), ["a", "a", "b"], ks=(1,)) == {
        "image to text R@1": [True, True, True],
        "text to image R@1": [True, True, True],
    }
    assert not any(recall(np.zeros((4, 4)), list("abcd"), ks=(1,))["image to text R@1"])
    with pytest.raises(ValueError, match="as many rows"):
        recall(np.zeros((2, 3)), ["a", "b"])


def test_the_networks_scores_find_the_caption_that_tells_the_noise() -> None:
    """A network that knows each picture's noise exactly when it is given its text, and nothing of it otherwise."""
    images = Streams(torch.stack([torch.full((4, 2, 2), float(k)) for k in range(3)]), torch.zeros(3, 1, 8))
    texts = torch.stack([torch.full((5, 6), float(k)) for k in range(3)])

    def net(img, clip_img, text, t_img, t_text, data_type, heads):  # type: ignore[no-untyped-def]
        from unidiffuser.schedule import alphas_cumprod

        abar = alphas_cumprod()[t_img.long()[0] - 1].float()
        clean = text.mean((1, 2)).round().view(-1, 1, 1, 1)
        return (img - abar.sqrt() * clean) / (1 - abar).sqrt(), clip_img / (1 - abar).sqrt(), None

    scores = network_scores(net, images, texts, levels=2, seed=0, batch=2)
    assert scores.shape == (3, 3)
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_nearest_distances_are_those_of_unit_vectors_and_leave_the_query_out() -> None:
    features = np.array([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])
    distances, indices = nearest_distances(features, features)
    assert distances == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)
    distances, indices = nearest_distances(features, features, own=[0, 1, 2], chunk=2)
    assert distances == pytest.approx([math.sqrt(2)] * 3)
    assert indices[0] == 1
    assert mean_distance(features) == pytest.approx((2 * math.sqrt(2) + 2) / 3)
    assert mean_distance(features, chunk=2) == pytest.approx((2 * math.sqrt(2) + 2) / 3)
    assert mean_distance(np.ones((4, 3))) == 0.0


def test_memorisation_results_tell_copies_from_new_pictures() -> None:
    rng = np.random.default_rng(4)
    training, real, fresh = (Outputs(arrays={"features": rng.standard_normal((2000, 8))}) for _ in range(3))
    copies = Outputs(arrays={"features": training.arrays["features"][:50] * 1.0001})
    nowhere = [-1] * 2000
    assert memorisation_results([copies], training, real, nowhere)[1]["value"] == 1.0
    assert memorisation_results([fresh], training, real, nowhere)[1]["value"] < 0.03


def test_clip_scores_are_cosines_and_never_negative() -> None:
    rows = np.eye(3, dtype=np.float32)
    assert clip_scores(rows, np.stack([rows[0], rows[0], -rows[2]])).tolist() == [1.0, 0.0, 0.0]


# Statistics


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Brown, Cai and DasGupta's and textbook values, to four places; 0 of 10 and 10 of 10 have closed forms.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=6e-5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    successes, total = case
    rate = successes / total
    for bound in wilson(successes, total):
        assert 0 <= bound <= 1
        spread = 1.959963984540054 * math.sqrt(bound * (1 - bound) / total)
        assert abs(abs(rate - bound) - spread) < 1e-7


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_wilson_refuses_what_is_no_share(successes: float, total: float) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, total)


def test_share_of_repeated_runs_is_no_narrower_than_one_run_and_of_independent_runs_is_pooled() -> None:
    trials = [True] * 30 + [False] * 20
    once, thrice = success_rate([trials]), success_rate([trials] * 3)
    assert (once.low, once.high) == wilson(30, 50)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert thrice.total == 150

    rng = random.Random(1)
    runs = [[rng.random() < 0.6 for _ in range(2000)] for _ in range(3)]
    pooled = success_rate(runs)
    assert (pooled.low, pooled.high) == pytest.approx(wilson(sum(map(sum, runs)), 6000), abs=2e-3)


def test_share_refuses_nothing_and_unequal_runs() -> None:
    for outcomes in ([], [[]], [[True], [True, False]]):
        with pytest.raises(ValueError, match=r"outcomes|length"):
            success_rate(outcomes)


def test_psnr_of_a_constant_offset() -> None:
    grey, lighter = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (110, 110, 110))
    assert psnr(to_tensor([lighter]), to_tensor([grey])).item() == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(to_tensor([grey]), to_tensor([grey])).item() == 100.0
