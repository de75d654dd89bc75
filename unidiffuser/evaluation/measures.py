"""From answers to numbers: the measures that need no judge, each a row with the task and split that it is of.

A row has ``task``, ``split``, ``measure``, ``value`` (the mean over seeds), ``values`` (one a seed), ``best`` ("high", "low" or
None where neither is better) and, where it means something, ``real``: the same of the real pictures and captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation.captions_metrics import bleu4, cider, exact
from unidiffuser.evaluation.clip_score import clip_scores
from unidiffuser.evaluation.frechet import fid, kid
from unidiffuser.evaluation.metrics import share
from unidiffuser.evaluation.neighbours import mean_distance, nearest_distances
from unidiffuser.evaluation.parts import Answers
from unidiffuser.evaluation.retrieval import recall

Row = dict[str, Any]
RETRIEVED = 5000  # the size of COCO's test split for retrieval; R@k falls with the number to choose from


def row(measure: str, values: Sequence[float], best: str | None, **more: Any) -> Row:
    return {"measure": measure, "value": float(np.mean(values)), "values": [float(v) for v in values], "best": best, **more}


def picture_rows(runs: Sequence[Answers], real: Answers) -> list[Row]:
    """FID and KID of made pictures against real ones, and how diverse both are."""
    made = [run.arrays["features"] for run in runs]
    seen = real.arrays["features"]
    kids = [kid(seen, features) for features in made]
    few = f"{min(map(len, made))} made and {len(seen)} real pictures for {seen.shape[1]} features"
    note = {"note": f"{few}: FID is biased, compare it at equal numbers only"} if len(seen) < 5 * seen.shape[1] else {}
    return [
        row("FID", [fid(seen, features) for features in made], "low", **note),
        row("KID", [value for value, _ in kids], "low", spread=float(np.mean([spread for _, spread in kids]))),
        row("distance among pictures", [mean_distance(f) for f in made], None, real=mean_distance(seen)),
    ]


def alignment_rows(runs: Sequence[tuple[Any, Any, Sequence[str]]], real: Answers | None = None) -> list[Row]:
    """CLIP score of pictures with their captions, and retrieval by CLIP among the first ``RETRIEVED`` of them.

    Args:
        runs: for each seed the embeddings of the pictures (N, D) and of the captions (N, D), and the captions.
        real: embeddings of real pictures and their captions, for comparison.
    """
    own = None if real is None else float(clip_scores(real.arrays["clip_image"], real.arrays["clip_text"]).mean())
    rows = [row("CLIP score", [float(clip_scores(i, t).mean()) for i, t, _ in runs], "high", real=own)]
    few = slice(RETRIEVED)
    return rows + recall_rows([recall(i[few] @ t[few].T, captions[few]) for i, t, captions in runs], "CLIP ")


def recall_rows(runs: Sequence[Mapping[str, Sequence[bool]]], prefix: str = "") -> list[Row]:
    """R@k with its interval; the runs are of the same pairs."""
    rows = []
    for name in runs[0]:
        found = share([run[name] for run in runs])
        rows.append(row(prefix + name, [float(np.mean(run[name])) for run in runs], "high", low=found.low, high=found.high))
    return rows


def caption_rows(runs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[Row]:
    """Exact, BLEU-4 and CIDEr-D of made captions; people's own where there are several of them for a picture.

    People's captions are scored as the first of each picture against its others.
    """
    several = all(len(mine) > 1 for mine in references)
    others = [list(mine[1:]) for mine in references]

    def scored(measure: Callable[[Sequence[str], Sequence[Sequence[str]]], float]) -> dict[str, Any]:
        values = [measure(captions, references) for captions in runs]
        own = measure([mine[0] for mine in references], others) if several else None
        return {"values": values, "best": "high", "real": own}

    right = share([exact(captions, references) for captions in runs])
    return [
        row("exact", [float(np.mean(exact(c, references))) for c in runs], "high", low=right.low, high=right.high),
        row("BLEU-4", **scored(bleu4)),
        row("CIDEr-D", **scored(cider)),
        row("different captions", [len(set(captions)) / len(captions) for captions in runs], None),
    ]


def memory_rows(runs: Sequence[Answers], training: Answers, real: Answers, own: Sequence[int]) -> list[Row]:
    """Distance of made pictures to the nearest training picture, and how many are nearer than real pictures ever are.

    "nearer than real" counts made pictures that are closer to a training picture than 99 % of the real pictures of the split
    are; about 1 % is what a model that copies nothing has.

    Args:
        own: for each real picture its own place among the training pictures, or -1.
    """
    memory = training.arrays["features"]
    usual, _ = nearest_distances(real.arrays["features"], memory, own)
    made = [nearest_distances(run.arrays["features"], memory)[0] for run in runs]
    limit = float(np.quantile(usual, 0.01))
    return [
        row("distance to training", [float(np.median(d)) for d in made], None, real=float(np.median(usual))),
        row("nearer than real", [float(np.mean(d < limit)) for d in made], "low", real=0.01),
    ]


def diversity_rows(answers: Answers, count: int) -> list[Row]:
    """Mean distance of ``count`` pictures of one caption from each other, over all captions, beside that of all pictures."""
    features = answers.arrays["features"]
    within = [mean_distance(features[first : first + count]) for first in range(0, len(features), count)]
    return [
        row("distance among pictures of one caption", [float(np.mean(within))], None, real=None, all=mean_distance(features))
    ]


def timing(runs: Mapping[str, Sequence[Answers]]) -> list[dict[str, Any]]:
    """Median seconds an item of each task, in batches as the run had them; the one thing that two runs differ in."""
    rows = []
    for task, cells in runs.items():
        each = [seconds / count for cell in cells for seconds, count in cell.seconds]
        rows.append({"task": task, "seconds": float(np.median(each)), "items": sum(n for c in cells for _, n in c.seconds)})
    return rows


def places(pairs: Sequence[Pair], among: Sequence[Pair]) -> list[int]:
    """For each pair its index among others by the file that it lies in, or -1."""
    known = {(pair.path, pair.place): k for k, pair in enumerate(among)}
    return [known.get((pair.path, pair.place), -1) for pair in pairs]
