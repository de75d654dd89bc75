"""One evaluation: its cells (a task, a split, a seed), the order they run in, and the figures they give."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.captioned import Pair
from ..media.files import write_text
from . import measures, tasks
from .classifier import NOT_JUDGED, Score
from .config import EvaluationConfig, Sweep
from .digests import pairs_digest
from .extractors import FeatureExtractors
from .parts import Outputs, collect
from .retrieval import recall
from .sampling import Sampler
from .sources import fixed_order, in_split, read_source

NO_SPLIT = "all"  # samples without a prompt belong to no split


@dataclass(frozen=True)
class EvaluatedModel:
    """The model under evaluation.

    Attributes:
        name: identifies weights, dtypes and defaults; finished work is kept per name.
        sampler: sampling options -> a sampler with these options.
        score_captions: (N pictures, M captions, levels, seed) -> scores (N, M) of each caption for each picture by the
            model's own denoising error.
    """

    name: str
    sampler: Callable[..., Sampler]
    score_captions: Callable[[Sequence[Image.Image], Sequence[str], int, int], NDArray[np.float32]]


class Evaluation:
    """One run: the data, the outputs of its cells, and the report.

    Args:
        config: what to measure.
        model: the model under evaluation.
        extractors: applied to all pictures and captions; a classifier among them is restricted to the labels of the data.
        score: scores the classifier's verdicts; needed where there is a classifier.
        progress: a bar on stderr for each cell.

    Raises:
        FileNotFoundError, ValueError: the data or a split is missing or damaged, or the classifier knows no label of the data.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        model: EvaluatedModel,
        extractors: FeatureExtractors,
        score: Score | None = None,
        progress: bool = True,
    ):
        self.config, self.model, self.extractors = config, model, extractors
        self.score, self.progress = score, progress
        self.folder = Path(config.out)
        self.pairs = read_source(config.data)
        if extractors.classifier is not None:
            classifier = extractors.classifier.among({pair.label for pair in self.pairs})
            self.extractors = replace(extractors, classifier=classifier)
            self.pairs = [pair for pair in self.pairs if pair.label in classifier.labels]
        self.chosen = {split: fixed_order(in_split(self.pairs, split), config.limit) for split in config.splits}
        self.runs: dict[tuple[str, str], list[Outputs]] = {}  # (task, split) -> one for each seed
        self.real: dict[str, Outputs] = {}
        self.timed: dict[str, list[Outputs]] = {}

    def run(self) -> dict[str, Any]:
        """Compute what is missing and write `scores.json`; returns its contents and keeps the outputs for the report."""
        for split, pairs in self.chosen.items():
            self.real[split] = self.encode_real(split, pairs)
        for task in self.config.tasks:
            for split in [NO_SPLIT] if task in ("joint", "image") else self.config.splits:
                self.runs[task, split] = [self.sample(task, split, seed) for seed in self.config.seeds]
        report = {
            "config": asdict(self.config) | {"out": None},  # the folder's place does not change the figures
            "model": self.model.name,
            "eyes": self.extractors.identity(),
            **self.judged(),
            "measures": self.results(),
            "sweeps": self.sweeps(),
            "timing": measures.timing(self.timed),
        }
        write_text(self.folder / "scores.json", json.dumps(report, indent=1, ensure_ascii=False))
        return report

    def sampling_steps(self, default: int) -> float:
        """Sampling steps of single items in all cells, finished or not; `default` where the config names no steps."""
        config, steps = self.config, self.config.options().get("steps") or default
        sampled = [task for task in config.tasks if task != "autoencode"]
        items = sum(
            config.pairs if task in ("joint", "image") else sum(map(len, self.chosen.values())) for task in sampled
        ) * len(config.seeds)
        total = float(items * steps)
        if config.diversity is not None:
            total += config.diversity.captions * config.diversity.count * steps
        for option, sweep in (("guidance", config.guidance_sweep), ("steps", config.steps_sweep)):
            if sweep is not None:
                limit = min(sweep.limit or len(self.pairs), len(in_split(self.pairs, sweep.split)))
                total += sum(value if option == "steps" else steps for value in sweep.values) * limit * len(config.seeds)
        return total

    def cell(self, name: str, settings: dict[str, Any], total: int, generate: tasks.Generate) -> Outputs:
        """The outputs of one cell, from disk where they are finished."""
        settings = {"name": name, "eyes": self.extractors.identity()} | settings
        return collect(self.folder / "cells", name, settings, total, self.config.batch, generate, self.progress)

    def encode_real(self, name: str, pairs: Sequence[Pair]) -> Outputs:
        """Features of real pictures, prepared as generated ones are."""
        generate = tasks.encode_real(self.extractors, pairs)
        return self.cell(f"real-{name}", {"pairs": pairs_digest(pairs)}, len(pairs), generate)

    def sample(self, task: str, split: str, seed: int, name: str = "", pairs: Sequence[Pair] = (), **changed: Any) -> Outputs:
        """One cell of a task; `changed` are sampling options other than the config's."""
        options = self.config.options(**changed)
        sampler = self.model.sampler(**options)
        pairs = pairs or self.chosen.get(split, ())
        captions = [pair.caption for pair in pairs]
        total = len(pairs) or self.config.pairs
        generators: dict[str, Callable[[], tasks.Generate]] = {
            "autoencode": lambda: tasks.autoencode(sampler, self.extractors, pairs, seed),
            "text_to_image": lambda: tasks.text_to_image(sampler, self.extractors, captions, seed),
            "image_to_text": lambda: tasks.image_to_text(sampler, self.extractors, pairs, seed),
            "joint": lambda: tasks.joint(sampler, self.extractors, seed),
            "image": lambda: tasks.image(sampler, self.extractors, seed),
        }
        settings = {"model": self.model.name, "pairs": pairs_digest(pairs), "seed": seed, "options": options}
        outputs = self.cell(name or f"{task}-{split}-{seed}", settings, total, generators[task]())
        self.timed.setdefault(", ".join([task, *(f"{key} {value:g}" for key, value in changed.items())]), []).append(outputs)
        return outputs

    def judged(self) -> dict[str, Any]:
        """The report's entries about the classifier's verdicts; empty without a classifier."""
        cells = {(*key, seed): cell for key, runs in self.runs.items() for seed, cell in self.by_seed(runs)}
        outputs = {f"{task}/{split}/{seed}": cell.items for (task, split, seed), cell in cells.items() if task != "image"}
        return self.scored(outputs, self.chosen)

    def scored(self, outputs: dict[str, list[dict[str, Any]]], chosen: dict[str, list[Pair]]) -> dict[str, Any]:
        if self.extractors.classifier is None or self.score is None:
            return NOT_JUDGED
        return self.score(outputs, chosen, self.pairs, self.extractors.classifier)

    def by_seed(self, runs: Sequence[Outputs]) -> list[tuple[int, Outputs]]:
        return list(zip(self.config.seeds, runs, strict=True))

    def results(self) -> list[measures.Result]:
        """All results that need no classifier."""
        results: list[measures.Result] = []
        training: list[Pair] = [] if self.config.training is None else read_source(self.config.training)
        encoded = self.encode_real("training", training) if training else None
        for (task, split), runs in self.runs.items():
            pairs = self.chosen.get(split, [pair for part in self.chosen.values() for pair in part])
            real = self.real[split] if split in self.real else self.encode_real("any", pairs)
            found: list[measures.Result] = []
            if task != "image_to_text":
                found += measures.image_results(runs, real)
            if task in ("text_to_image", "joint", "image") and encoded is not None:
                found += measures.memorisation_results(runs, encoded, real, measures.indices(pairs, training))
            generated = [[item["caption"] for item in run.items] for run in runs if task in ("image_to_text", "joint")]
            if task == "image_to_text":
                found += measures.caption_results(generated, [pair.captions for pair in pairs])
            if self.extractors.clip is not None and task in ("text_to_image", "image_to_text", "joint"):
                images = [(run if task != "image_to_text" else real).arrays["clip_image"] for run in runs]
                captions = generated or [[pair.caption for pair in pairs]] * len(runs)
                texts = [run.arrays["clip_text"] for run in runs]
                found += measures.clip_results(list(zip(images, texts, captions, strict=True)), real)
            results += [{"task": task, "split": split} | result for result in found]
        return results + self.retrieval() + self.diversity()

    def retrieval(self) -> list[measures.Result]:
        """R@k of real pictures and captions, matched by the network's own denoising error."""
        settings = self.config.retrieval
        if settings is None:
            return []
        pairs = fixed_order(in_split(self.pairs, settings.split), settings.count)
        captions = [pair.caption for pair in pairs]

        def generate(items: range) -> Outputs:
            images = [pairs[k].image() for k in items]
            return Outputs([{} for _ in items], {"scores": self.model.score_captions(images, captions, settings.levels, 0)})

        identity = {"model": self.model.name, "pairs": pairs_digest(pairs), "levels": settings.levels}
        outputs = self.cell(f"retrieval-{settings.split}", identity, len(pairs), generate)
        found = measures.recall_results([recall(outputs.arrays["scores"], captions)], f"of {len(pairs)}, ")
        return [{"task": "retrieval", "split": settings.split} | result for result in found]

    def diversity(self) -> list[measures.Result]:
        """Diversity of several pictures of one caption."""
        settings = self.config.diversity
        if settings is None:
            return []
        pairs = fixed_order(in_split(self.pairs, settings.split), settings.captions)
        repeated = [pair for pair in pairs for _ in range(settings.count)]
        outputs = self.sample("text_to_image", settings.split, 0, f"diversity-{settings.split}", repeated)
        found = measures.diversity_results(outputs, settings.count)
        return [{"task": "diversity", "split": settings.split} | result for result in found]

    def sweeps(self) -> dict[str, list[dict[str, Any]]]:
        """`guidance` and `steps` -> one point for each value: `value` and the figures of its pictures by name."""
        found = {}
        for option, sweep in (("guidance", self.config.guidance_sweep), ("steps", self.config.steps_sweep)):
            if sweep is not None:
                found[option] = [self.sweep_point(option, value, sweep) for value in sweep.values]
        return found

    def sweep_point(self, option: str, value: float, sweep: Sweep) -> dict[str, Any]:
        pairs = fixed_order(in_split(self.pairs, sweep.split), sweep.limit)
        real = self.encode_real(f"sweep-{sweep.split}", pairs)
        name = f"{option}-{value:g}-{sweep.split}"
        runs = [
            self.sample("text_to_image", sweep.split, seed, f"{name}-{seed}", pairs, **{option: value})
            for seed in self.config.seeds
        ]
        found = measures.image_results(runs, real)
        if self.extractors.clip is not None:
            captions = [pair.caption for pair in pairs]
            found += measures.clip_results([(r.arrays["clip_image"], r.arrays["clip_text"], captions) for r in runs], real)
        point = {"value": value, "n": len(pairs)} | {result["measure"]: result["value"] for result in found}
        items = {f"text_to_image/sweep/{seed}": run.items for seed, run in self.by_seed(runs)}
        judged = self.scored(items, {"sweep": pairs})["judged"]
        return point | {f"judge: {result['measure']}": result["rate"] for result in judged}
