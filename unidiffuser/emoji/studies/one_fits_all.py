"""One network for all distributions, against networks of the same size and budget trained for one task each.

    python -m unidiffuser.emoji.studies.one_fits_all --data data/emoji [--pairs 100000] [--concepts 40] [--doc FILE]

Three networks start from the same weights and see the same number of training pairs, with the encoders, data and optimizer of
the bundled model: "joint" with all noise levels, "text to image" with clean captions only, "image to text" with clean pictures
only. The last two also train their own modality without a condition on a tenth of their pairs, for guidance. The joint network
so has about half as many pairs for each task. A few concepts, chosen by a hash of their names, keep the budget small. Pictures
are scored by the judge among these concepts; captions must match to the letter. Training and answers resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ...checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ...data.captioned import Pair
from ...evaluation.metrics import success_rate
from ...evaluation.sources import fixed_order, in_split, read_folder
from ...media.files import write_between, write_text
from ...pipeline import load
from ...training.config import TrainConfig
from ...training.loop import train
from ..baselines import parse_caption
from ..judge import Judge, load_judge
from ..network import NetworkStage
from ..network_options import Captioning, Mix, Network, Sizes, Suggested
from .report import write_sheet

MARKERS = ("<!-- one fits all -->", "<!-- /one fits all -->")
MIXES = {
    "joint": {"independent": 0.12, "clean_text": 0.38, "clean_image": 0.3, "equal": 0.2},
    "text to image": {"clean_text": 0.9, "no_text": 0.1},
    "image to text": {"clean_image": 0.9, "independent": 0.1},
}
TASKS = {"joint": ("text to image", "image to text"), "text to image": ("text to image",), "image to text": ("image to text",)}
BATCH = 128  # of training
SHOWN = 48  # items in the network at once
SHEET = 16  # pictures on a sheet
SPLITS = {"trained": ("train", 192), "held out": ("heldout", None)}


def network(name: str, pairs: int, labels: Sequence[str], optimizer: Literal["muon", "adamw"] = "muon") -> Network:
    """The settings of one network; the three differ in the mix only."""
    steps, sizes = pairs // BATCH, vars(load_checkpoint("emoji").config.uvit)
    chosen = {**sizes, "detail_cond": sizes["detail_told"]}
    return Network(
        steps=steps,
        batch_size=BATCH,
        optimizer=optimizer,
        learning_rate=1e-3,
        decay=0.5,
        weight_decay=0.01,
        ema_decay=max(0.9, 1 - 10 / steps),  # over a tenth of the run: a longer average would remember the beginning
        save_every=100,
        where={"tone": (0,), "demo": (True,), "label": tuple(labels)},
        with_style=0.8,
        sizes=Sizes(**{name: chosen[name] for name in Sizes.__dataclass_fields__}),
        mix=Mix(**MIXES[name]),
        lean=0.3,
        captioning=Captioning(
            where={"tone": (0,), "known": (True,), "label": tuple(labels)}, versions=2, place=0.6, other_latent=0.7
        ),
        suggested=Suggested(steps=20, guidance=3.0),
    )


def chosen(examples: Sequence[Pair], count: int) -> list[str]:
    """Labels of this many concepts, in an order that only depends on their names."""
    labels = {pair.label for pair in examples}
    return sorted(labels, key=lambda label: hashlib.sha256(label.encode()).digest())[:count]


def write_encoders(path: Path) -> None:
    """The bundled model without its network."""
    bundled = load_checkpoint("emoji")
    parts = {name: bundled.state_dict(name) for name in bundled.parts() if name != "uvit"}
    save_checkpoint(path, bundled.config, parts, bundled.tokenizer_specs())


def answers(model: Any, task: str, pairs: Sequence[Pair], judge: Judge, seed: int) -> dict[str, list[bool]]:
    """Right or wrong for each item, by measure."""
    options = {"seed": seed, "batch_size": SHOWN}
    if task == "text to image":
        seen = judge.classify(model.text_to_image([pair.caption for pair in pairs], **options))
        return {
            "concept": [verdict.label == pair.label for verdict, pair in zip(seen, pairs, strict=True)],
            "style": [verdict.style == pair.style for verdict, pair in zip(seen, pairs, strict=True)],
        }
    captions = model.image_to_text([pair.image() for pair in pairs], **options)
    return {"label": [parse_caption(c, judge.styles)[0] == pair.label for c, pair in zip(captions, pairs, strict=True)]}


def table(found: dict[str, dict[str, list[list[bool]]]], pairs: int) -> str:
    """One line for each task, split and measure; a column for the one network and one for the other."""
    lines = [
        f"| task | asked | measure | one network, {pairs:,} pairs | one for this task, {pairs:,} pairs |",
        "|" + " --- |" * 5,
    ]
    for key in found:
        name, task, split, measure = key.split("/")
        if name == "joint" and f"{task}/{task}/{split}/{measure}" in found:
            values = [str(success_rate(found[f"{network}/{task}/{split}/{measure}"]["right"])) for network in (name, task)]
            lines.append(f"| {task} | {split} | {measure} | {values[0]} | {values[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder made by python -m unidiffuser.emoji prepare")
    parser.add_argument("--pairs", type=int, default=100_000, help="that each network sees")
    parser.add_argument("--concepts", type=int, default=40, help="of the bundled model's 240")
    parser.add_argument("--out", type=Path, default=Path("out/one_fits_all"))
    parser.add_argument("--only", choices=list(MIXES), help="train and ask this network alone")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"), help="adamw where the CPU multiplies no bf16")
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of each network's pictures (default: --out)")
    parser.add_argument("--doc", type=Path, help="write the table into this file, between the markers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)

    encoders = args.out / "encoders.safetensors"
    if not encoders.is_file():
        write_encoders(encoders)
    examples = [pair for pair in read_folder(args.data) if pair.fields.get("demo")]
    labels = chosen(examples, args.concepts)
    examples = [pair for pair in examples if pair.label in labels]
    asked = {split: fixed_order(in_split(examples, field), limit) for split, (field, limit) in SPLITS.items()}
    judge = load_judge().among(labels)
    found: dict[str, Any] = {}
    for name in [args.only] if args.only else MIXES:
        run = args.out / name.replace(" ", "_")
        options = network(name, args.pairs, labels, args.optimizer)
        config = options.config("network", run, seed=0, precision="auto")
        config.options["labels"] = labels
        if (run / "model.safetensors").is_file():
            kept = TrainConfig.from_file(run / "config.json")
            if (kept.steps, kept.options["labels"]) != (config.steps, labels):
                parser.error(f"{run} was trained with other --pairs or --concepts; give these, or another --out")
        else:
            train(NetworkStage(config, options, args.data, encoders), config)
        path = run / "answers.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        model = load(run / "model.safetensors")
        sheet = (args.sheets or args.out) / f"one-fits-all-{run.name.replace('_', '-')}.jpg"
        if "text to image" in TASKS[name] and not sheet.is_file():
            captions = [pair.caption for pair in asked["trained"][:SHEET]]  # the first ones, chosen by nobody
            write_sheet(sheet, model.text_to_image(captions, seed=0, batch_size=SHOWN), captions, 8)
        for task in TASKS[name]:
            for split, pairs in asked.items():
                for seed in map(int, args.seeds.split(",")):
                    if (key := f"{task}/{split}/{seed}") not in known:
                        known[key] = answers(model, task, pairs, judge, seed)
                        write_text(path, json.dumps(known))
                    for measure, right in known[key].items():
                        found.setdefault(f"{name}/{task}/{split}/{measure}", {"right": []})["right"].append(right)
    result = table(found, args.pairs)
    print(result)
    if args.doc:
        write_between(args.doc, result, MARKERS)


if __name__ == "__main__":
    main()
