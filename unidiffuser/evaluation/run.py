"""The evaluation: which cells there are, in which order they are made, and which numbers come of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation import measures, tasks
from unidiffuser.evaluation.config import EvaluationConfig, Sweep
from unidiffuser.evaluation.eyes import Eyes
from unidiffuser.evaluation.identity import pairs_digest
from unidiffuser.evaluation.parts import Answers, collect
from unidiffuser.evaluation.retrieval import recall
from unidiffuser.evaluation.sampling import Sampler
from unidiffuser.evaluation.scores import score, style_confusion
from unidiffuser.evaluation.sources import fixed_order, in_split, read_source
from unidiffuser.media.files import write_text

log = logging.getLogger(__name__)

NO_SPLIT = "all"  # what comes out of nothing belongs to no split


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        name: what tells it from others, weights and defaults included.
        sampler: options -> the model asked with them.
        fit: (pictures, captions, levels, seed) -> how well each caption fits each picture, by the model's own denoising
            error: (N, M) scores.
    """

    name: str
    sampler: Callable[..., Sampler]
    fit: Callable[[Sequence[Image.Image], Sequence[str], int, int], Any]


class Evaluation:
    """One run: the data, the cells as they are made, and the report.

    Args:
        config: what to do.
        subject: the model.
        eyes: what looks at its answers.
        progress: a bar on stderr for each cell.

    Raises:
        FileNotFoundError, ValueError: the data or a split is not right, or a judge meets data without labels.
    """

    def __init__(self, config: EvaluationConfig, subject: Subject, eyes: Eyes, progress: bool = True):
        self.config, self.subject, self.eyes, self.progress = config, subject, eyes, progress
        self.folder = Path(config.out)
        self.pairs = read_source(config.data)
        if eyes.judge is not None:
            judge = eyes.judge.among({pair.label for pair in self.pairs})
            self.eyes = replace(eyes, judge=judge)
            self.pairs = [pair for pair in self.pairs if pair.label in judge.concepts]
        self.chosen = {split: fixed_order(in_split(self.pairs, split), config.limit) for split in config.splits}
        self.runs: dict[tuple[str, str], list[Answers]] = {}  # (task, split) -> one for each seed
        self.reals: dict[str, Answers] = {}
        self.timed: dict[str, list[Answers]] = {}

    def run(self) -> dict[str, Any]:
        """Make what is missing and write ``scores.json``; returns what it holds, and leaves the answers for the report."""
        for split, pairs in self.chosen.items():
            self.reals[split] = self.look(split, pairs)
        for task in self.config.tasks:
            for split in [NO_SPLIT] if task in ("joint", "image") else self.config.splits:
                self.runs[task, split] = [self.ask(task, split, seed) for seed in self.config.seeds]
        report = {
            "config": asdict(self.config) | {"out": None},  # where it lies changes nothing
            "model": self.subject.name,
            "eyes": self.eyes.names(),
            **self.judged(),
            "measures": self.measured(),
            "sweeps": self.sweeps(),
            "timing": measures.timing(self.timed),
        }
        write_text(self.folder / "scores.json", json.dumps(report, indent=1, ensure_ascii=False))
        return report

    def cell(self, name: str, settings: dict[str, Any], total: int, make: tasks.Make, size: int | None = None) -> Answers:
        known = {"name": name, "eyes": self.eyes.names()} | settings
        size = size or self.config.batch
        return collect(self.folder / "cells", name, known, total, size, make, self.progress)

    def look(self, name: str, pairs: Sequence[Pair]) -> Answers:
        """Real pictures, seen as made ones are."""
        return self.cell(f"real-{name}", {"pairs": pairs_digest(pairs)}, len(pairs), tasks.look(self.eyes, pairs))

    def ask(self, task: str, split: str, seed: int, name: str = "", pairs: Sequence[Pair] = (), **changed: Any) -> Answers:
        """One cell of a task; ``changed`` are sampling options other than the config's."""
        options = self.config.options(**changed)
        sampler = self.subject.sampler(**options)
        pairs = pairs or self.chosen.get(split, ())
        captions = [pair.caption for pair in pairs]
        total = len(pairs) or self.config.pairs
        makers: dict[str, Callable[[], tasks.Make]] = {
            "autoencode": lambda: tasks.autoencode(sampler, self.eyes, pairs, seed),
            "text_to_image": lambda: tasks.text_to_image(sampler, self.eyes, captions, seed),
            "image_to_text": lambda: tasks.image_to_text(sampler, self.eyes, pairs, seed),
            "joint": lambda: tasks.joint(sampler, self.eyes, seed),
            "image": lambda: tasks.image(sampler, self.eyes, seed),
        }
        settings = {"model": self.subject.name, "pairs": pairs_digest(pairs), "seed": seed, "options": options}
        answers = self.cell(name or f"{task}-{split}-{seed}", settings, total, makers[task]())
        self.timed.setdefault(", ".join([task, *(f"{key} {value:g}" for key, value in changed.items())]), []).append(answers)
        return answers

    def judged(self) -> dict[str, Any]:
        """The judge's table, and which style was seen where which was asked for; both empty without a judge."""
        if self.eyes.judge is None:
            return {"judged": [], "styles": [], "style_confusion": {}}
        answers = {
            f"{task}/{split}/{seed}": cell.items
            for (task, split), cells in self.runs.items()
            for seed, cell in zip(self.config.seeds, cells, strict=True)
            if task != "image"
        }
        styles = self.eyes.judge.styles
        rows = score(answers, self.chosen, self.pairs, self.eyes.judge)
        confusion = style_confusion(answers, self.chosen, styles)
        return {"judged": rows, "styles": list(styles), "style_confusion": confusion}

    def measured(self) -> list[dict[str, Any]]:
        """Rows of all measures that need no judge."""
        rows: list[dict[str, Any]] = []
        memory: list[Pair] = [] if self.config.training is None else read_source(self.config.training)
        training = self.look("training", memory) if memory else None
        for (task, split), cells in self.runs.items():
            pairs = self.chosen.get(split, [pair for part in self.chosen.values() for pair in part])
            real = self.reals[split] if split in self.reals else self.look("any", pairs)
            found: list[dict[str, Any]] = []
            if task != "image_to_text":
                found += measures.picture_rows(cells, real)
            if task in ("text_to_image", "joint", "image") and training is not None:
                found += measures.memory_rows(cells, training, real, measures.places(pairs, memory))
            said = [[item["caption"] for item in cell.items] for cell in cells if task in ("image_to_text", "joint")]
            if task == "image_to_text":
                found += measures.caption_rows(said, [pair.captions for pair in pairs])
            if self.eyes.clip is not None and task in ("text_to_image", "image_to_text", "joint"):
                seen = [(cell if task != "image_to_text" else real).arrays["clip_image"] for cell in cells]
                asked = said or [[pair.caption for pair in pairs]] * len(cells)
                texts = [cell.arrays["clip_text"] for cell in cells]
                found += measures.alignment_rows(list(zip(seen, texts, asked, strict=True)), real)
            rows += [{"task": task, "split": split} | row for row in found]
        return rows + self.retrieved() + self.diverse()

    def retrieved(self) -> list[dict[str, Any]]:
        """R@k of real pictures and captions, matched by the network itself."""
        asked = self.config.retrieval
        if asked is None:
            return []
        pairs = fixed_order(in_split(self.pairs, asked.split), asked.count)
        captions = [pair.caption for pair in pairs]

        def make(items: range) -> Answers:
            images = [pairs[k].image() for k in items]
            return Answers([{} for _ in items], {"scores": self.subject.fit(images, captions, asked.levels, 0)})

        settings = {"model": self.subject.name, "pairs": pairs_digest(pairs), "levels": asked.levels}
        answers = self.cell(f"retrieval-{asked.split}", settings, len(pairs), make)
        found = measures.recall_rows([recall(answers.arrays["scores"], captions)], f"of {len(pairs)}, ")
        return [{"task": "retrieval", "split": asked.split} | row for row in found]

    def diverse(self) -> list[dict[str, Any]]:
        """Several pictures for each of some captions."""
        asked = self.config.diversity
        if asked is None:
            return []
        pairs = fixed_order(in_split(self.pairs, asked.split), asked.captions)
        repeated = [pair for pair in pairs for _ in range(asked.count)]
        answers = self.ask("text_to_image", asked.split, 0, f"diversity-{asked.split}", repeated)
        return [{"task": "diversity", "split": asked.split} | row for row in measures.diversity_rows(answers, asked.count)]

    def sweeps(self) -> dict[str, list[dict[str, Any]]]:
        """``guidance`` and ``steps`` -> one point for each value: ``value`` and the measures of its pictures by name."""
        found = {}
        for option, sweep in (("guidance", self.config.guidance_sweep), ("steps", self.config.steps_sweep)):
            if sweep is not None:
                found[option] = [self.point(option, value, sweep) for value in sweep.values]
        return found

    def point(self, option: str, value: float, sweep: Sweep) -> dict[str, Any]:
        pairs = fixed_order(in_split(self.pairs, sweep.split), sweep.limit)
        real = self.look(f"sweep-{sweep.split}", pairs)
        name = f"{option}-{value:g}-{sweep.split}"
        cells = [
            self.ask("text_to_image", sweep.split, seed, f"{name}-{seed}", pairs, **{option: value})
            for seed in self.config.seeds
        ]
        rows = measures.picture_rows(cells, real)
        if self.eyes.clip is not None:
            asked = [pair.caption for pair in pairs]
            rows += measures.alignment_rows([(c.arrays["clip_image"], c.arrays["clip_text"], asked) for c in cells], real)
        point = {"value": value, "n": len(pairs)} | {row["measure"]: row["value"] for row in rows}
        if self.eyes.judge is not None:
            key = "text_to_image/sweep/{}"
            answers = {key.format(seed): cell.items for seed, cell in zip(self.config.seeds, cells, strict=True)}
            judged = score(answers, {"sweep": pairs}, self.pairs, self.eyes.judge)
            point |= {f"judge: {row['measure']}": row["rate"] for row in judged}
        return point
