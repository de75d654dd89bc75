"""Figures of a task from its outputs, apart from a classifier's.

Each result is a dict with `measure`, `value` (the mean over seeds), `values` (one a seed), `best` ("high", "low", or None
where neither is better) and, where it makes sense, `real`: the same of the real pictures and captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.captioned import Pair
from .caption_metrics import bleu4, cider, exact
from .clip_score import clip_scores
from .frechet import fid, kid
from .metrics import success_rate
from .neighbours import mean_distance, nearest_distances
from .parts import Outputs
from .retrieval import recall

Result = dict[str, Any]
RETRIEVAL_SIZE = 5000  # the size of COCO's test split for retrieval; R@k falls with the number of candidates


def result(measure: str, values: Sequence[float], best: str | None, **more: Any) -> Result:
    """One row of the results: a measure, its value for each seed and their mean, and whether "low" or "high" is best."""
    return {"measure": measure, "value": float(np.mean(values)), "values": [float(v) for v in values], "best": best, **more}


def image_results(runs: Sequence[Outputs], real: Outputs) -> list[Result]:
    """FID and KID of generated pictures against real ones, and the diversity of both."""
    generated = [run.arrays["features"] for run in runs]
    reference = real.arrays["features"]
    kids = [kid(reference, features) for features in generated]
    counts = f"{min(map(len, generated))} made and {len(reference)} real pictures for {reference.shape[1]} features"
    few = len(reference) < 5 * reference.shape[1]
    note = {"note": f"{counts}: FID is biased, compare it at equal numbers only"} if few else {}
    return [
        result("FID", [fid(reference, features) for features in generated], "low", **note),
        result("KID", [value for value, _ in kids], "low", spread=float(np.mean([spread for _, spread in kids]))),
        result("distance among pictures", [mean_distance(f) for f in generated], None, real=mean_distance(reference)),
    ]


def clip_results(runs: Sequence[tuple[NDArray[Any], NDArray[Any], Sequence[str]]], real: Outputs | None = None) -> list[Result]:
    """CLIP score of pictures with their captions, and retrieval by CLIP among the first `RETRIEVAL_SIZE` of them.

    Args:
        runs: for each seed the embeddings of the pictures (N, D) and of the captions (N, D), and the captions.
        real: embeddings of real pictures and their captions, for comparison.
    """
    of_real = None if real is None else float(clip_scores(real.arrays["clip_image"], real.arrays["clip_text"]).mean())
    scores = result("CLIP score", [float(clip_scores(i, t).mean()) for i, t, _ in runs], "high", real=of_real)
    first = slice(RETRIEVAL_SIZE)
    return [scores, *recall_results([recall(i[first] @ t[first].T, captions[first]) for i, t, captions in runs], "CLIP ")]


def recall_results(runs: Sequence[Mapping[str, Sequence[bool]]], prefix: str = "") -> list[Result]:
    """R@k with its interval; all runs are of the same pairs."""
    results = []
    for name in runs[0]:
        rate = success_rate([run[name] for run in runs])
        values = [float(np.mean(run[name])) for run in runs]
        results.append(result(prefix + name, values, "high", low=rate.low, high=rate.high))
    return results


def caption_results(runs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[Result]:
    """Exact matches, BLEU-4 and CIDEr-D of generated captions.

    Where every picture has several references, `real` is the score of the first against the others.
    """
    several = all(len(group) > 1 for group in references)
    others = [list(group[1:]) for group in references]

    def scored(measure: Callable[[Sequence[str], Sequence[Sequence[str]]], float]) -> dict[str, Any]:
        values = [measure(captions, references) for captions in runs]
        real = measure([group[0] for group in references], others) if several else None
        return {"values": values, "best": "high", "real": real}

    matches = [exact(captions, references) for captions in runs]
    rate = success_rate(matches)
    return [
        result("exact", [float(np.mean(run)) for run in matches], "high", low=rate.low, high=rate.high),
        result("BLEU-4", **scored(bleu4)),
        result("CIDEr-D", **scored(cider)),
        result("different captions", [len(set(captions)) / len(captions) for captions in runs], None),
    ]


def memorisation_results(runs: Sequence[Outputs], training: Outputs, real: Outputs, own: Sequence[int]) -> list[Result]:
    """Distance of generated pictures to the nearest training picture, and how many are closer than real pictures.

    "nearer than real" is the fraction of generated pictures closer to a training picture than 99 % of the real pictures of
    the split; a model that copies nothing has about 1 %.

    Args:
        runs: generated pictures, one a seed.
        training: all training pictures.
        real: real pictures of the split.
        own: for each real picture its own index among the training pictures, or -1.
    """
    references = training.arrays["features"]
    usual, _ = nearest_distances(real.arrays["features"], references, own)
    distances = [nearest_distances(run.arrays["features"], references)[0] for run in runs]
    limit = float(np.quantile(usual, 0.01))
    return [
        result("distance to training", [float(np.median(d)) for d in distances], None, real=float(np.median(usual))),
        result("nearer than real", [float(np.mean(d < limit)) for d in distances], "low", real=0.01),
    ]


def diversity_results(outputs: Outputs, count: int) -> list[Result]:
    """Mean distance among the `count` pictures of one caption, over all captions, and among all pictures."""
    features = outputs.arrays["features"]
    within = [mean_distance(features[first : first + count]) for first in range(0, len(features), count)]
    name = "distance among pictures of one caption"
    return [result(name, [float(np.mean(within))], None, real=None, all=mean_distance(features))]


def timing(runs: Mapping[str, Sequence[Outputs]]) -> list[dict[str, Any]]:
    """Median seconds an item of each task at the run's batch size; the only figures that differ between two runs."""
    results = []
    for task, cells in runs.items():
        each = [seconds / count for cell in cells for seconds, count in cell.seconds]
        items = sum(count for cell in cells for _, count in cell.seconds)
        results.append({"task": task, "seconds": float(np.median(each)), "items": items})
    return results


def indices(pairs: Sequence[Pair], among: Sequence[Pair]) -> list[int]:
    """For each pair the index of the pair with the same picture file among others, or -1."""
    known = {(pair.path, pair.place): k for k, pair in enumerate(among)}
    return [known.get((pair.path, pair.place), -1) for pair in pairs]
