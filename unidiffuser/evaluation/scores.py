"""From answers to a table: each measure with its interval, the judge's ceiling beside it and two baselines.

ceiling
    the judge on *real* pictures of the same captions. A perfect model would score this, not 100 %.
nearest
    a model that only remembers. Text-to-image: the training picture of the nearest caption, which for a held-out pair shows
    the concept in another style. Image-to-text: the caption of the training picture nearest in pixels. On trained pairs
    the nearest is the pair itself, so this baseline is only telling on the other splits.
shuffled
    the model's own answers scored against somebody else's question: what is left when the content does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unidiffuser.data.captioned import Pair
from unidiffuser.emoji.judge import Judge
from unidiffuser.evaluation.metrics import nearest, nearest_by_caption, parse_caption, share, shuffled, thumbnails
from unidiffuser.media.images import to_tensor

Answer = Mapping[str, Any]
Row = dict[str, Any]


def score(
    answers: Mapping[str, Sequence[Answer]],
    chosen: Mapping[str, Sequence[Pair]],
    pairs: Sequence[Pair],
    judge: Judge,
) -> list[Row]:
    """One row for each task, split and measure.

    Args:
        answers: ``"task/split/seed"`` -> the answers of that cell, dicts of the judge's ``concept``, ``drawn`` style (of
            pictures) and of the ``caption`` (where one was made); the seeds of a split become the runs of its rows.
        chosen: split -> the pairs that were asked for, in order.
        pairs: all real pictures; those of the ``train`` split are the memory of the baseline "nearest".
        judge: for the ceilings.

    Returns:
        rows with ``task``, ``split``, ``measure``, ``rate``, ``low``, ``high``, ``total`` (trials times seeds), and, where they
        mean something, ``ceiling``, ``nearest`` and ``shuffled``; all shares in [0, 1]. Autoencoded pictures also have a mean
        ``psnr`` in dB, joint pairs the number of ``distinct`` known labels.
    """
    runs: dict[tuple[str, str], list[Sequence[Answer]]] = {}
    for key, cell in answers.items():
        task, split, _ = key.split("/")
        if task != "joint":
            asked = [{"label": pair.label, "style": pair.style} for pair in chosen[split]]
            cell = [question | dict(answer) for question, answer in zip(asked, cell, strict=True)]
        runs.setdefault((task, split), []).append(cell)
    training = [pair for pair in pairs if pair.split == "train"]
    rows: list[Row] = []
    for (task, split), cells in runs.items():
        if task == "autoencode":
            found = score_reconstructions(cells, chosen[split], judge)
        elif task == "text_to_image":
            found = score_pictures(cells, chosen[split], training, judge)
        elif task == "image_to_text":
            found = score_captions(cells, chosen[split], training, judge.styles)
        else:
            found = score_pairs(cells, judge)
        rows += [{"task": task, "split": split, **row} for row in found]
    return rows


def style_confusion(
    answers: Mapping[str, Sequence[Answer]], chosen: Mapping[str, Sequence[Pair]], styles: Sequence[str]
) -> dict[str, dict[str, list[int]]]:
    """``"task/split"`` -> style asked for -> how many pictures were seen in each of ``styles``, all seeds together."""
    found: dict[str, dict[str, list[int]]] = {}
    for key, cell in answers.items():
        task, split, _ = key.split("/")
        if task in ("autoencode", "text_to_image"):
            table = found.setdefault(f"{task}/{split}", {style: [0] * len(styles) for style in styles})
            for pair, answer in zip(chosen[split], cell, strict=True):
                table[pair.style][styles.index(answer["drawn"])] += 1
    return found


def score_pictures(
    runs: Sequence[Sequence[Answer]], asked: Sequence[Pair], training: Sequence[Pair], judge: Judge
) -> list[Row]:
    """Does the judge see the concept, and the style, that the caption asked for?"""
    concept, style = score_reconstructions(runs, asked, judge)
    remembered = nearest_by_caption(asked, training) if training else []
    if remembered:
        concept["nearest"], style["nearest"] = judged(judge, remembered, asked)
    return [concept, style]


def score_reconstructions(runs: Sequence[Sequence[Answer]], asked: Sequence[Pair], judge: Judge) -> list[Row]:
    """The same for pictures that were not imagined but only encoded and decoded; and their mean PSNR where it is there."""
    concept = row("concept", runs, lambda picture, asked_for: picture["concept"] == asked_for["label"])
    style = row("style", runs, lambda picture, asked_for: picture["drawn"] == asked_for["style"])
    concept["ceiling"], style["ceiling"] = judged(judge, asked, asked)
    ratios = [answer["psnr"] for run in runs for answer in run if "psnr" in answer]
    if ratios:
        concept["psnr"] = sum(ratios) / len(ratios)
    return [concept, style]


def judged(judge: Judge, shown: Sequence[Pair], asked: Sequence[Pair]) -> tuple[float, float]:
    """How often the judge sees in real pictures the concepts, and the styles, of ``asked``."""
    verdicts = judge.judge_pictures([pair.image() for pair in shown])
    pairs = list(zip(verdicts, asked, strict=True))
    return mean([v.concept == e.label for v, e in pairs]), mean([v.style == e.style for v, e in pairs])


def score_captions(
    runs: Sequence[Sequence[Answer]], asked: Sequence[Pair], training: Sequence[Pair], styles: Sequence[str]
) -> list[Row]:
    """Is the caption's label, and its style word, letter by letter the picture's?"""
    memory: list[Pair] = []
    if training:
        queries, references = (thumbnails(to_tensor([e.image() for e in part])) for part in (asked, training))
        memory = [training[index] for index in nearest(queries, references).tolist()]
    label = row("label", runs, lambda answer, question: parse_caption(answer["caption"], styles)[0] == question["label"])
    style = row("style", runs, lambda answer, question: parse_caption(answer["caption"], styles)[1] == question["style"])
    if memory:
        label["nearest"] = mean([m.label == e.label for m, e in zip(memory, asked, strict=True)])
        style["nearest"] = mean([m.style == e.style for m, e in zip(memory, asked, strict=True)])
    return [label, style]


def score_pairs(runs: Sequence[Sequence[Answer]], judge: Judge) -> list[Row]:
    """Does the judge see in the picture what the caption beside it says? A caption that is no label counts as no."""

    def says(answer: Answer) -> tuple[str, str | None]:
        return parse_caption(answer["caption"], judge.styles)

    known = set(judge.concepts)
    legible = row("caption is a known label", runs, lambda answer, _: says(answer)[0] in known)
    del legible["shuffled"]
    legible["distinct"] = len({says(answer)[0] for run in runs for answer in run} & known)
    return [
        row("agreed concept", runs, lambda picture, text: picture["concept"] == says(text)[0]),
        row("agreed style", runs, lambda picture, text: picture["drawn"] == says(text)[1]),
        legible,
    ]


def row(measure: str, runs: Sequence[Sequence[Answer]], right: Callable[[Answer, Answer], bool]) -> Row:
    """The share of answers for which ``right(answer, answer)``, and the same against a shuffled second argument."""
    result = share([[right(answer, answer) for answer in run] for run in runs])
    swapped = [right(run[i], run[j]) for run in runs for i, j in enumerate(shuffled(len(run)))]
    return {
        "measure": measure,
        "rate": result.rate,
        "low": result.low,
        "high": result.high,
        "total": result.total,
        "shuffled": mean(swapped),
    }


def mean(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes)
