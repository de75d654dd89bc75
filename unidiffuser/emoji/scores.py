"""Scores of the judge's verdicts, with confidence intervals, the judge's own accuracy and two baselines.

ceiling
    the judge on the *real* pictures of the same captions; a perfect model would reach this, not 100 %.
nearest
    a model that only memorised. Text to image: the training picture of the same label, which for a held-out pair is in
    another style. Image to text: the caption of the training picture nearest in pixels. On trained pairs the nearest picture
    is the pair itself, so this baseline is meaningful on the other splits only.
shuffled
    the model's outputs scored against the inputs of other items: the score of content-independent outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.captioned import Pair
from ..evaluation.classifier import Classifier, Item
from ..evaluation.metrics import success_rate
from ..evaluation.report import Cells, percent
from ..evaluation.report import tables as measured_tables
from ..media.images import to_tensor
from .baselines import nearest, nearest_by_caption, parse_caption, shuffled, thumbnails

Row = dict[str, Any]


def score(
    outputs: Mapping[str, Sequence[Item]],
    chosen: Mapping[str, Sequence[Pair]],
    pairs: Sequence[Pair],
    classifier: Classifier,
) -> dict[str, Any]:
    """The judge's entries of `scores.json`, an `unidiffuser.evaluation.classifier.Score`.

    Args:
        outputs: `"task/split/seed"` -> the items of that cell.
        chosen: split -> the pairs used as input, in order.
        pairs: all real pictures.
        classifier: the judge, restricted to the labels of `pairs`.

    Returns:
        `judged`: one dict for each task, split and measure; `styles`: the judge's styles; `style_confusion`: see
        `style_confusion`.
    """
    return {
        "judged": judged_rows(outputs, chosen, pairs, classifier),
        "styles": list(classifier.styles),
        "style_confusion": style_confusion(outputs, chosen, classifier.styles),
    }


def judged_rows(
    outputs: Mapping[str, Sequence[Item]],
    chosen: Mapping[str, Sequence[Pair]],
    pairs: Sequence[Pair],
    judge: Classifier,
) -> list[Row]:
    """One row for each task, split and measure.

    Args:
        outputs: `"task/split/seed"` -> the items of that cell: dicts of the judge's `concept`, `drawn` style (of pictures) and
            of the `caption` (where one was generated); the seeds of a split become the runs of its rows.
        chosen: split -> the pairs used as input, in order.
        pairs: all real pictures; those of the `train` split give the baseline "nearest".
        judge: for the ceilings.

    Returns:
        rows with `task`, `split`, `measure`, `rate`, `low`, `high`, `total` (trials times seeds) and, where they apply,
        `ceiling`, `nearest` and `shuffled`; all rates in [0, 1]. Autoencoded pictures also have a mean `psnr` in dB, joint
        pairs the number of `distinct` known labels.
    """
    runs: dict[tuple[str, str], list[Sequence[Item]]] = {}
    for key, items in outputs.items():
        task, split, _ = key.split("/")
        if task != "joint":
            inputs = [{"label": pair.label, "style": pair.style} for pair in chosen[split]]
            items = [given | dict(item) for given, item in zip(inputs, items, strict=True)]
        runs.setdefault((task, split), []).append(items)
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
    outputs: Mapping[str, Sequence[Item]], chosen: Mapping[str, Sequence[Pair]], styles: Sequence[str]
) -> dict[str, dict[str, list[int]]]:
    """`"task/split"` -> style of the input -> number of pictures classified as each of `styles`, over all seeds."""
    found: dict[str, dict[str, list[int]]] = {}
    for key, items in outputs.items():
        task, split, _ = key.split("/")
        if task in ("autoencode", "text_to_image"):
            table = found.setdefault(f"{task}/{split}", {style: [0] * len(styles) for style in styles})
            for pair, item in zip(chosen[split], items, strict=True):
                table[pair.style][styles.index(item["drawn"])] += 1
    return found


def score_pictures(
    runs: Sequence[Sequence[Item]], inputs: Sequence[Pair], training: Sequence[Pair], judge: Classifier
) -> list[Row]:
    """Whether the judge recognises the concept, and the style, of the caption."""
    concept, style = score_reconstructions(runs, inputs, judge)
    memorised = nearest_by_caption(inputs, training) if training else []
    if memorised:
        concept["nearest"], style["nearest"] = accuracy(judge, memorised, inputs)
    return [concept, style]


def score_reconstructions(runs: Sequence[Sequence[Item]], inputs: Sequence[Pair], judge: Classifier) -> list[Row]:
    """The same for pictures that were only encoded and decoded, with their mean PSNR where it is known."""
    concept = row("concept", runs, lambda picture, given: picture["concept"] == given["label"])
    style = row("style", runs, lambda picture, given: picture["drawn"] == given["style"])
    concept["ceiling"], style["ceiling"] = accuracy(judge, inputs, inputs)
    ratios = [item["psnr"] for run in runs for item in run if "psnr" in item]
    if ratios:
        concept["psnr"] = sum(ratios) / len(ratios)
    return [concept, style]


def accuracy(judge: Classifier, pictures: Sequence[Pair], targets: Sequence[Pair]) -> tuple[float, float]:
    """How often the judge recognises in real pictures the labels, and the styles, of `targets`."""
    verdicts = judge.classify([pair.image() for pair in pictures])
    pairs = list(zip(verdicts, targets, strict=True))
    return mean([v.label == t.label for v, t in pairs]), mean([v.style == t.style for v, t in pairs])


def score_captions(
    runs: Sequence[Sequence[Item]], inputs: Sequence[Pair], training: Sequence[Pair], styles: Sequence[str]
) -> list[Row]:
    """Whether a caption's label, and its style, equals the picture's."""
    nearest_training: list[Pair] = []
    if training:
        queries, references = (thumbnails(to_tensor([pair.image() for pair in part])) for part in (inputs, training))
        nearest_training = [training[index] for index in nearest(queries, references).tolist()]
    label = row("label", runs, lambda item, given: parse_caption(item["caption"], styles)[0] == given["label"])
    style = row("style", runs, lambda item, given: parse_caption(item["caption"], styles)[1] == given["style"])
    if nearest_training:
        label["nearest"] = mean([n.label == pair.label for n, pair in zip(nearest_training, inputs, strict=True)])
        style["nearest"] = mean([n.style == pair.style for n, pair in zip(nearest_training, inputs, strict=True)])
    return [label, style]


def score_pairs(runs: Sequence[Sequence[Item]], judge: Classifier) -> list[Row]:
    """Whether the judge recognises the caption's label and style in its picture; an unknown label counts as wrong."""

    def parsed(item: Item) -> tuple[str, str | None]:
        return parse_caption(item["caption"], judge.styles)

    known = set(judge.labels)
    legible = row("caption is a known label", runs, lambda item, _: parsed(item)[0] in known)
    del legible["shuffled"]
    legible["distinct"] = len({parsed(item)[0] for run in runs for item in run} & known)
    return [
        row("agreed concept", runs, lambda picture, text: picture["concept"] == parsed(text)[0]),
        row("agreed style", runs, lambda picture, text: picture["drawn"] == parsed(text)[1]),
        legible,
    ]


def row(measure: str, runs: Sequence[Sequence[Item]], right: Callable[[Item, Item], bool]) -> Row:
    """The rate of items with `right(item, item)`, and the same with the second argument shuffled."""
    result = success_rate([[right(item, item) for item in run] for run in runs])
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


def tables(report: Mapping[str, Any]) -> dict[str, Cells]:
    """Title -> cells of all tables of a report, the judge's in front and its style confusion after the other measures."""
    judged, styles = judged_cells(report["judged"]), confusion_cells(report["style_confusion"], report["styles"])
    return {"Judged": judged, "Measured": [], "Styles": styles} | measured_tables(report)


def judged_cells(rows: Sequence[Row]) -> Cells:
    """The judge's table, in per cent."""
    table = [["task", "split", "measure", "rate (95 % interval)", "n", "judge's ceiling", "nearest training", "shuffled"]]
    for row in rows:
        rate = f"{percent(row['rate'])} ({percent(row['low'])} to {percent(row['high'])})"
        marks = [percent(row.get(name)) for name in ("ceiling", "nearest", "shuffled")]
        table.append([row["task"], row["split"], row["measure"], rate, str(row["total"]), *marks])
    return table


def confusion_cells(confusion: Mapping[str, Mapping[str, Sequence[int]]], styles: Sequence[str]) -> Cells:
    """Number of pictures of each style of the input that are classified as each style."""
    lines = [[*key.split("/"), style, *map(str, counts)] for key, table in confusion.items() for style, counts in table.items()]
    return [["task", "split", "style asked for", *(f"seen as {style}" for style in styles)], *lines]
