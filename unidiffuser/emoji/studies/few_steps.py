"""Quality over evaluations for every task: the bundled network with few steps, and its fast LoRA.

    python -m unidiffuser.emoji.studies.few_steps --data data/emoji [--tasks "captions;pairs"] [--lora FILE] [--items 883]

Every setting of a task starts from the same captions or pictures, and each is compared with the first item by item, so a loss
has the 95 % interval of the paired difference. Evaluations are the passes of one item through the network, all halves of a task
together. Answers are kept in answers.json, under the digest of the LoRA: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.captioned import Pair
from ...evaluation.digests import file_digest
from ...evaluation.sources import fixed_order, in_split, read_folder
from ...media.files import write_between, write_text
from ...pipeline import UniDiffuser, load
from ..baselines import parse_caption
from ..judge import Judge, load_judge
from .quality import counted, paired
from .report import FEW_STEPS

Answer = tuple[str, str | None]
BATCH = 64
FAST: dict[str, Any] = {"preset": "fast"}
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Task:
    """A task: what it makes of a batch of pairs, whether a result fits its pair, and the settings, the exact one first.

    Attributes:
        split: "seen" (trained and validation pairs) or "heldout"; each pair is used with as many seeds as the items need.
        answer: (model, judge, pairs, options) -> what was drawn or written, as (concept, style), and what is right.
        steps: of the network with guidance, after the exact ones.
        student: of the fast LoRA.
        exact: steps of the exact setting.
        most: items that are measured at most.
    """

    split: str
    answer: Callable[..., list[tuple[Answer, Answer]]]
    steps: Sequence[int]
    student: Sequence[int]
    exact: int = 20
    most: int | None = None


def pictures(prompt: Callable[[Pair], str]) -> Callable[..., list[tuple[Answer, Answer]]]:
    def answer(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
        drawn = judge.classify(model.text_to_image([prompt(e) for e in part], **options))
        return [((v.label, v.style), (e.label, e.style)) for v, e in zip(drawn, part, strict=True)]

    return answer


def captions(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
    texts = model.image_to_text([e.image() for e in part], **options)
    return [(parse_caption(text, judge.styles), (e.label, e.style)) for text, e in zip(texts, part, strict=True)]


def pairs(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
    """Whether the judge sees in a picture what the caption made with it says; a caption without a style agrees with any."""
    made = model.joint(count=len(part), **options)
    seen = judge.classify([picture for picture, _ in made])
    said = [parse_caption(text, judge.styles) for _, text in made]
    return [((v.label, v.style), (label, style or v.style)) for v, (label, style) in zip(seen, said, strict=True)]


def variations(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
    drawn = judge.classify(model.vary_image([e.image() for e in part], **options))
    return [((v.label, v.style), (e.label, e.style)) for v, e in zip(drawn, part, strict=True)]


def chains(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
    """Eight chains of two rounds from each caption: whether the last picture still shows it."""
    found: list[tuple[Answer, Answer]] = []
    for e in part[::8]:
        last = [picture for picture, _ in model.gibbs(e.caption, rounds=2, count=8, **options)][1::2]
        found += [((v.label, v.style), (e.label, e.style)) for v in judge.classify(last)]
    return found[: len(part)]


def inversions(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[Answer, Answer]]:
    """Pictures inverted to noise under their captions, and generated from it again."""
    noise = model.invert([e.image() for e in part], [e.caption for e in part], **options)
    drawn = judge.classify(model.reconstruct(noise, **options))
    return [((v.label, v.style), (e.label, e.style)) for v, e in zip(drawn, part, strict=True)]


TASKS: dict[str, Task] = {
    "text to image": Task("seen", pictures(lambda e: e.caption), (10, 6, 4), (4, 2, 1)),
    "text to image, held out": Task("heldout", pictures(lambda e: e.caption), (10, 6, 4), (4, 2, 1)),
    "text to image, no style": Task("seen", pictures(lambda e: e.label), (10, 6, 4), (4, 2, 1)),
    "captions": Task("seen", captions, (10, 4, 2, 1), (2, 1)),
    "captions, held out": Task("heldout", captions, (10, 4, 2, 1), (2, 1)),
    "pairs": Task("seen", pairs, (10, 6), (6, 3, 2)),
    "variations": Task("seen", variations, (10, 6, 4), (4, 2)),
    "Gibbs chains": Task("seen", chains, (10, 4), (4, 2)),
    "inversions": Task("seen", inversions, (50, 20, 10), (), exact=100, most=192),
}


def settings(task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each setting of a task."""
    yield "exact", {"steps": task.exact}
    for steps in task.steps:
        yield f"{steps} steps", {"steps": steps}
    for steps in task.student:
        yield f"fast, {steps} steps", {**FAST, "steps": steps}


def measure(
    model: UniDiffuser, judge: Judge, task: Task, examples: dict[str, list[Pair]], options: dict[str, Any], items: int
) -> dict[str, Any]:
    """For each item whether concept and style are right, and the evaluations of an item."""
    pool, concept, style = examples[task.split], list[int](), list[int]()
    items = min(items, task.most or items)
    blocks, passes = model.config.uvit.depth // 2 * 2 + 1, 0.0
    with counted(model.net) as rows:
        for start in range(0, items, BATCH):
            part = [pool[k % len(pool)] for k in range(start, min(start + BATCH, items))]
            found = task.answer(model, judge, part, seed=start * MOST_SEEDS, **options)
            passes = passes or rows[0] / len(part)  # of the first batch, which is whole
            concept += [int(seen == right) for (seen, _), (right, _) in found]
            style += [int(seen == right) for (_, seen), (_, right) in found]
    return {"concept": concept, "style": style, "evaluations": passes / blocks}


def compare(mine: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Accuracy in %, and the loss against the exact setting on the same items with its 95 % interval, in points."""
    row: dict[str, Any] = {"n": len(mine["concept"]), "evaluations": mine["evaluations"]}
    for measure_ in ("concept", "style"):
        row |= paired(measure_, list(zip(mine[measure_], exact[measure_], strict=True)))
    return row


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All tasks and settings that were measured."""
    lines = [
        "| task | setting | evaluations | concept % | loss, points | style % | loss, points | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, rows in found.items():
        for name, row in rows.items():
            cells = [task, name, f"{row['evaluations']:.0f}"]
            for measure_ in ("concept", "style"):
                loss = "" if name == "exact" else f"{row[f'{measure_}_loss']:+.1f} ± {row[f'{measure_}_error']:.1f}"
                cells += [f"{row[measure_]:.1f}", loss]
            lines.append(f"| {' | '.join([*cells, str(row['n'])])} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Right concepts and styles over evaluations, a panel for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, math.ceil(len(TASKS) / 2), squeeze=False).flatten()
    for axes, (task, rows) in zip(panels, found.items(), strict=False):
        for measure_, marker in (("concept", "o"), ("style", "s")):
            for label, color in (("network", "C0"), ("fast LoRA", "C1")):
                chosen = [row for name, row in rows.items() if name.startswith("fast") is (label == "fast LoRA")]
                points = sorted((row["evaluations"], row[measure_], row[f"{measure_}_error"]) for row in chosen)
                if points:
                    x, y, error = zip(*points, strict=True)
                    style = "-" if measure_ == "concept" else "--"
                    axes.errorbar(
                        x, y, yerr=error, fmt=marker + style, color=color, ms=4, capsize=2, label=f"{measure_}, {label}"
                    )
        axes.set_xscale("log", base=2)
        ticks = [1, 2, 4, 8, 20, 40, 80, 160]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params(labelsize=7)
        axes.set_title(task, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.supxlabel("evaluations of the network for one item", fontsize=9)
    figure.supylabel("right, % (bars: 95 % of the difference to exact)", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder made by python -m unidiffuser.emoji prepare")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--lora", type=Path, help="fast LoRA instead of the one beside the model")
    parser.add_argument("--tasks", help="tasks, separated by semicolons; all if not given")
    parser.add_argument("--only", help="settings, separated by semicolons; all if not given")
    parser.add_argument("--items", type=int, default=883)
    parser.add_argument("--out", type=Path, default=Path("out/few-steps"))
    parser.add_argument("--doc", type=Path, help="write the table of all that is there into this file, between the markers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(TASKS) if args.tasks is None else [name.strip() for name in args.tasks.split(";")]
    if unknown := set(names) - set(TASKS):
        parser.error(f"unknown tasks {sorted(unknown)}; there are {', '.join(TASKS)}")

    judge, model = load_judge(), load(args.model)
    if args.lora is not None:
        model._loras.student = args.lora
    digest = "" if model._loras.student is None else file_digest(model._loras.student)[:12]
    known = [p for p in read_folder(args.data) if p.fields.get("demo") and p.label in judge.labels]
    splits = {split: fixed_order(in_split(known, split), None) for split in ("train", "validation", "heldout")}
    examples = {"seen": splits["train"] + splits["validation"], "heldout": splits["heldout"]}
    path = args.out / "answers.json"
    answers: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def key(task: str, name: str) -> str:
        return f"{task}/{name}/{digest if name.startswith('fast') else ''}/{args.items}"

    for task in names:
        for name, options in settings(TASKS[task]):
            if key(task, name) in answers or (args.only and name != "exact" and name not in args.only.split(";")):
                continue
            answers[key(task, name)] = measure(model, judge, TASKS[task], examples, options, args.items)
            write_text(path, json.dumps(answers))
            row = compare(answers[key(task, name)], answers[key(task, "exact")])
            losses = [f"{m} {row[m]:.1f}, loss {row[f'{m}_loss']:+.1f} ± {row[f'{m}_error']:.1f}" for m in ("concept", "style")]
            print(f"{task}, {name}: {row['evaluations']:.0f} evaluations, {'; '.join(losses)}", flush=True)
    found = {
        task: {
            name: compare(answers[key(task, name)], answers[key(task, "exact")])
            for name, _ in settings(TASKS[task])
            if key(task, name) in answers
        }
        for task in TASKS
        if key(task, "exact") in answers
    }
    write_text(args.out / "few-steps.json", json.dumps(found, indent=1))
    plot(found, args.out / "few-steps.png")
    print(table(found))
    if args.doc:
        write_between(args.doc, table(found), FEW_STEPS)


if __name__ == "__main__":
    main()
