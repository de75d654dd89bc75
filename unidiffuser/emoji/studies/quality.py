"""The cost of each acceleration in quality: accuracy of the bundled model against network evaluations and time.

    python -m unidiffuser.emoji.studies.quality --data data/emoji [--task captions] [--seeds 0,1,2] [--only "exact;fast"]

Every setting starts from the same captions and the same noise (with --task captions: the same pictures; label and style must
match to the letter), so settings are compared item by item and the loss has the 95 % interval of the paired difference. An
evaluation is one pass of one item through all blocks of the network; cached passes count by the blocks that they run. Answers
are kept in answers.json: an interrupted run goes on, and more seeds add to the earlier ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...data.captioned import Pair
from ...evaluation.sources import fixed_order, in_split, read_folder
from ...media.files import write_between, write_text
from ...pipeline import UniDiffuser, load
from ...uvit import Block, UViT
from ..baselines import parse_caption
from ..judge import Judge, load_judge
from .report import CAPTION_QUALITY, QUALITY

STEPS = 20  # of the exact setting that all others are compared with: the bundled model's own
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "float32": {},  # the same in the CPU's exact format
    **{f"{n} steps": {"steps": n} for n in (14, 10, 8, 6)},
    "10 steps, logsnr": {"steps": 10, "spacing": "logsnr"},
    "10 steps, logsnr, 3M": {"steps": 10, "spacing": "logsnr", "method": "dpmpp_3m"},
    "10 steps, logsnr, guidance 7": {"steps": 10, "spacing": "logsnr", "guidance": 7.0},
    "10 steps, guidance 5": {"steps": 10, "guidance": 5.0},
    "10 steps, karras": {"steps": 10, "spacing": "karras"},
    "guidance above 500": {"guidance_interval": (500, 1000)},
    "guidance below 700": {"guidance_interval": (0, 700)},
    "cache every 2nd": {"cache_interval": 2},
    "cache every 3rd": {"cache_interval": 3},
    "14 steps, cache every 2nd": {"steps": 14, "cache_interval": 2},
    "14 steps, logsnr, cache every 2nd": {"steps": 14, "spacing": "logsnr", "cache_interval": 2},
    "12 steps, logsnr, guidance above 300": {"steps": 12, "spacing": "logsnr", "guidance_interval": (300, 1000)},
    "10 steps, logsnr, guidance 2.6": {"steps": 10, "spacing": "logsnr", "guidance": 2.6},  # "fast" without a fast LoRA
}


@contextmanager
def counted(net: UViT) -> Iterator[list[int]]:
    """Counts the items that pass through the blocks of a network."""
    rows = [0]

    def count(block: torch.nn.Module, given: Any, out: torch.Tensor) -> None:
        rows[0] += len(out)

    hooks = [module.register_forward_hook(count) for module in net.modules() if isinstance(module, Block)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def answers_of_pictures(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[str, str | None]]:
    """Concept and style of the pictures drawn for some captions, by the judge."""
    pictures = model.text_to_image([e.caption for e in part], **options)
    return [(v.label, v.style) for v in judge.classify(pictures)]


def answers_of_captions(model: UniDiffuser, judge: Judge, part: Sequence[Pair], **options: Any) -> list[tuple[str, str | None]]:
    """Label and style in the captions of some pictures."""
    return [parse_caption(text, judge.styles) for text in model.image_to_text([e.image() for e in part], **options)]


Answer = Callable[..., list[tuple[str, str | None]]]
TASKS: dict[str, tuple[Answer, tuple[str, str]]] = {
    "pictures": (answers_of_pictures, QUALITY),
    "captions": (answers_of_captions, CAPTION_QUALITY),
}


def draw(
    answer: Answer, model: UniDiffuser, judge: Judge, examples: Sequence[Pair], options: dict[str, Any], seed: int, batch: int
) -> dict[str, Any]:
    """One setting and seed: for each pair whether its concept and its style are right; evaluations and seconds."""
    concept, style, wall, processor = [], [], 0.0, 0.0
    blocks, passes = model.config.uvit.depth // 2 * 2 + 1, 0.0
    with counted(model.net) as rows:
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            before = time.perf_counter(), time.process_time()
            found = answer(model, judge, part, **{"steps": STEPS} | options, seed=seed * 10**6 + start)
            wall, processor = wall + time.perf_counter() - before[0], processor + time.process_time() - before[1]
            passes = passes or rows[0] / len(part)  # of the first batch, which is whole: the last one may be filled up
            concept += [int(label == e.label) for (label, _), e in zip(found, part, strict=True)]
            style += [int(named == e.style) for (_, named), e in zip(found, part, strict=True)]
    items = len(examples)
    return {
        "concept": concept, "style": style, "evaluations": passes / blocks,
        "wall_s": wall / items, "processor_s": processor / items,
    }  # fmt: skip


def compare(answers: dict[str, Any], name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracy in %, and the loss against "exact" on the same items with its 95 % interval, in percentage points."""
    runs = [(answers[f"{name}/{seed}"], answers[f"exact/{seed}"]) for seed in seeds]
    row: dict[str, Any] = {"setting": name, "n": sum(len(mine["concept"]) for mine, _ in runs)}
    for measure in ("concept", "style"):
        pairs = [(a, b) for mine, exact in runs for a, b in zip(mine[measure], exact[measure], strict=True)]
        row |= paired(measure, pairs)
    for key in ("evaluations", "wall_s", "processor_s"):
        row[key] = sum(mine[key] for mine, _ in runs) / len(runs)
    return row


def paired(measure: str, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Accuracy in %, and the loss with its 95 % interval in percentage points, of (answer, exact answer) to the same items."""
    gaps = [b - a for a, b in pairs]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
    accuracy = 100 * sum(a for a, _ in pairs) / len(pairs)
    return {measure: accuracy, f"{measure}_loss": 100 * mean, f"{measure}_error": 100 * 1.96 * spread}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| setting | evaluations a picture | concept % | loss, points | style % | loss, points | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = [r["setting"], f"{r['evaluations']:.1f}"]
        for measure in ("concept", "style"):
            loss = f"{r[f'{measure}_loss']:+.1f} ± {r[f'{measure}_error']:.1f}"
            cells += [f"{r[measure]:.1f}", "" if r["setting"] == "exact" else loss]
        lines.append(f"| {' | '.join([*cells, str(r['n'])])} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Judge accuracy over processor time a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = sorted((row for row in rows if row["setting"] != "float32"), key=lambda row: row["concept_loss"])
    for number, row in enumerate(rows):
        crowd = [other for other in rows if abs(other["evaluations"] - row["evaluations"]) < 1]
        x = row["evaluations"] + 0.45 * (crowd.index(row) - (len(crowd) - 1) / 2)  # side by side where many cost the same
        label = f"{row['setting']} ({row['evaluations']:.1f})"
        axes.errorbar(
            x, -row["concept_loss"], yerr=row["concept_error"] or None, fmt="o", capsize=2, label=label,
            color=f"C{number % 10}", mfc=None if number < 10 else "white",
        )  # fmt: skip
    axes.legend(title="setting (evaluations)", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.set_xlabel("evaluations of the network a picture; its time is in proportion")
    axes.set_ylabel("right concepts, percentage points against exact")
    axes.set_title("Bars: 95 % interval of the paired difference to exact", fontsize=9)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", type=Path, required=True, help="image folder made by python -m unidiffuser.emoji prepare")
    parser.add_argument("--task", choices=list(TASKS), default="pictures")
    parser.add_argument("--out", type=Path, help="default: out/quality for pictures, out/quality-captions for captions")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="settings, separated by semicolons; all if not given")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--doc", type=Path, help="write the table of all that is there into this file, between the markers")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    args.out = args.out or Path("out/quality" if args.task == "pictures" else f"out/quality-{args.task}")
    args.out.mkdir(parents=True, exist_ok=True)
    answer, markers = TASKS[args.task]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    names = (
        list(SETTINGS) if args.only is None else ["exact", *(n.strip() for n in args.only.split(";") if n.strip() != "exact")]
    )

    judge = load_judge()
    examples = [p for p in read_folder(args.data) if p.fields.get("demo") and p.label in judge.labels]
    asked = [e for split in ("train", "validation") for e in fixed_order(in_split(examples, split), None)]
    path = args.out / "answers.json"
    answers = json.loads(path.read_text()) if path.is_file() else {}
    automatic = load(args.model, device=args.device)
    exact = load(args.model, device=args.device, dtype=torch.float32)
    for seed in seeds:
        for name in names:
            if f"{name}/{seed}" in answers:
                continue
            model = exact if name == "float32" else automatic
            answers[f"{name}/{seed}"] = draw(answer, model, judge, asked, SETTINGS[name], seed, args.batch)
            write_text(path, json.dumps(answers))
            row = compare(answers, name, [seed])
            loss = f"{row['concept_loss']:+.1f} ± {row['concept_error']:.1f}"
            print(
                f"{name} (seed {seed}): {row['evaluations']:.1f} evaluations, concept {row['concept']:.1f}, loss {loss}",
                flush=True,
            )
    rows = [compare(answers, name, seeds_of(answers, name)) for name in SETTINGS if seeds_of(answers, name)]
    write_text(args.out / "quality.json", json.dumps({"steps": STEPS, "rows": rows}, indent=1))
    plot(rows, args.out / "quality.png")
    print(table(rows))
    if args.doc:
        write_between(args.doc, table(rows), markers)


def seeds_of(answers: dict[str, Any], name: str) -> list[int]:
    """The seeds for which both a setting and the exact one were drawn."""
    found = {n: {int(key.rpartition("/")[2]) for key in answers if key.rpartition("/")[0] == n} for n in (name, "exact")}
    return sorted(found[name] & found["exact"])


if __name__ == "__main__":
    main()
