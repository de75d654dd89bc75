"""The evaluation run: a model asked in all directions, its answers judged, cell by cell.

    autoencode     every picture of a split through the autoencoder alone: what the judge can see at best in a made picture
    text_to_image  every caption "label, style" of a split -> a picture -> the judge's concept and style
    image_to_text  every picture of a split -> a caption -> compared letter by letter
    joint          pairs out of nothing -> does the judge see in the picture what the caption says?

A *cell* is one (task, split, seed). Finished cells are kept in ``cells.json`` with the settings that they were made with, so a
run that was killed goes on where it stopped, and changed settings (or another model or judge) make a cell anew. A cell holds
answers, not scores: :mod:`unidiffuser.evaluation.scores` computes those, so scoring again costs no sampling.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm.auto import tqdm

from unidiffuser.evaluation.data import Example, in_split, pixels, read_examples
from unidiffuser.evaluation.judge import Judge
from unidiffuser.evaluation.metrics import psnr
from unidiffuser.evaluation.scores import score
from unidiffuser.files import write_text
from unidiffuser.images import contact_sheet, save_png, to_images

log = logging.getLogger(__name__)

TASKS = ("autoencode", "text_to_image", "image_to_text", "joint")
SPLITS = ("train", "validation", "heldout")
NO_SPLIT = "all"  # joint pairs are drawn out of nothing and belong to no split
GRID = 64  # pictures in a grid, the first of the fixed order: nobody chooses them


class Model(Protocol):
    """What an evaluation needs of a model; :class:`unidiffuser.pipeline.UniDiffuser` is one."""

    @property
    def autoencoder(self) -> Any: ...

    @property
    def text_to_image(self) -> Callable[..., list[Image.Image]]: ...

    @property
    def image_to_text(self) -> Callable[..., list[str]]: ...

    @property
    def joint(self) -> Callable[..., list[tuple[Image.Image, str]]]: ...


@dataclass(frozen=True)
class Settings:
    """What a cell's answers depend on besides its task, split and seed.

    Attributes:
        model: what tells one model from another, such as the SHA-256 of its file.
        judge: likewise for the judge.
        steps, guidance: handed to the model; None leaves the model's own defaults.
        limit: most captions or pictures of a split; they are the first of a fixed shuffle.
        pairs: joint pairs of a seed.
        batch: items asked for at once. It matters, since the items of one call share a seed.
    """

    model: str
    judge: str
    steps: int | None = None
    guidance: float | None = None
    limit: int | None = None
    pairs: int = 256
    batch: int = 16

    def options(self, seed: int, start: int) -> dict[str, Any]:
        """Keywords of the model call that begins with item ``start``; every call of every seed has a seed of its own."""
        options: dict[str, Any] = {"seed": seed * 1_000_000 + start}
        options |= {"steps": self.steps} if self.steps is not None else {}
        return options | ({"guidance": self.guidance} if self.guidance is not None else {})


def evaluate(
    model: Model,
    data: str | Path,
    out: str | Path,
    judge: Judge,
    settings: Settings,
    *,
    splits: Sequence[str] = SPLITS,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = TASKS,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask, judge and score; resume what is there.

    Args:
        model: the model to judge.
        data: image folder with labels, styles and splits (see :mod:`unidiffuser.evaluation.data`).
        out: folder for ``cells.json``, ``scores.json`` and one grid of pictures for each cell.
        judge: the classifier; only the concepts it knows are asked for.
        settings: steps, guidance, sizes and what identifies the model and the judge.
        splits, seeds, tasks: which cells.
        progress: a bar on stderr.

    Returns:
        what ``scores.json`` holds: the settings and a list of rows, each with task, split, measure, rate, interval, ceiling
        and baselines.

    Raises:
        FileNotFoundError, ValueError: if the data, a split, a task or a number is not right.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks or not seeds or not splits:
        raise ValueError(f"nothing to evaluate, or unknown tasks {unknown}: choose from {', '.join(TASKS)}")
    if settings.batch < 1 or settings.pairs < 2 or (settings.limit is not None and settings.limit < 2):
        raise ValueError(f"batch must be at least 1, pairs and limit at least 2: {settings}")
    examples = [example for example in read_examples(data) if example.label in judge.concepts]
    chosen = {split: fixed_order(in_split(examples, split), settings.limit) for split in splits}
    out = Path(out)
    cells = read_cells(out / "cells.json")
    wanted = {
        f"{task}/{split}/{seed}": (task, split, seed)
        for task in tasks
        for split in ([NO_SPLIT] if task == "joint" else splits)
        for seed in seeds
    }
    for key, (task, split, seed) in wanted.items():
        if cells.get(key, {}).get("settings") == asdict(settings):
            log.info("%s is there already", key)
            continue
        answers, sheet = ask(model, judge, task, chosen.get(split, []), settings, seed, key if progress else None)
        save_png(sheet, out / f"{key.replace('/', '-')}.png")
        cells[key] = {"settings": asdict(settings), "answers": answers}
        write_text(out / "cells.json", json.dumps(cells, indent=1, ensure_ascii=False))
    answered = {key: cells[key]["answers"] for key in wanted}
    rows = score(answered, chosen, examples, judge)
    report = {"settings": asdict(settings), "seeds": list(seeds), "rows": rows}
    write_text(out / "scores.json", json.dumps(report, indent=1, ensure_ascii=False))
    return report


def fixed_order(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """A shuffle that is the same in every run, cut to ``limit``: a fair sample and an uncurated grid."""
    return random.Random(0).sample(list(examples), len(examples))[:limit]


def read_cells(path: Path) -> dict[str, Any]:
    """The finished cells of an earlier run; none if there was none."""
    if not path.is_file():
        return {}
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start the evaluation anew") from error
    if not isinstance(cells, dict):
        raise ValueError(f"{path} is not a file of this evaluation; name another output folder")
    return cells


def ask(
    model: Model, judge: Judge, task: str, examples: Sequence[Example], settings: Settings, seed: int, bar: str | None
) -> tuple[list[dict[str, Any]], Image.Image]:
    """The answers of one cell and the grid of the first ``GRID`` of them.

    An answer is a dict of the ``label`` and ``style`` asked for (all but joint), the ``caption`` given (image_to_text, joint),
    the judge's ``concept``, ``drawn`` style and ``confidence`` (all but image_to_text), and the ``psnr`` (autoencode, in dB).
    """
    answers: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    total = settings.pairs if task == "joint" else len(examples)
    with tqdm(total=total, desc=bar, disable=bar is None) as ticks:
        for start, count in chunks(total, settings.batch):
            part = examples[start : start + count]
            options = settings.options(seed, start)
            asked: list[dict[str, Any]] = [{"label": example.label, "style": example.style} for example in part]
            if task == "autoencode":
                real = [example.image() for example in part]
                shown = autoencoded(model, real, options["seed"])
                fresh = [
                    a | v | {"psnr": round(psnr(r, s), 3)}
                    for a, v, r, s in zip(asked, see(judge, shown), real, shown, strict=True)
                ]
            elif task == "text_to_image":
                shown = model.text_to_image([example.caption for example in part], **options)
                fresh = [a | v for a, v in zip(asked, see(judge, shown), strict=True)]
            elif task == "image_to_text":
                shown = [example.image() for example in part]
                captions = model.image_to_text(shown, **options)
                fresh = [a | {"caption": c} for a, c in zip(asked, captions, strict=True)]
            else:
                pairs = model.joint(count=count, **options)
                shown = [image for image, _ in pairs]
                fresh = [{"caption": c} | v for (_, c), v in zip(pairs, see(judge, shown), strict=True)]
            answers += fresh
            pictures += shown[: max(0, GRID - len(pictures))]
            ticks.update(count)
    under = [answer.get("caption") or f"{answer['label']}, {answer['style']}" for answer in answers[: len(pictures)]]
    return answers, contact_sheet(pictures, under)


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, count)`` of consecutive parts of ``range(total)``, all but the last of ``size``."""
    for start in range(0, total, size):
        yield start, min(size, total - start)


def autoencoded(model: Model, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
    """Pictures encoded, sampled and decoded again, each at its own size."""
    latents = model.autoencoder.encode(pixels(images), torch.Generator().manual_seed(seed))
    return to_images(model.autoencoder.decode(latents))


def see(judge: Judge, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    return [
        {"concept": verdict.concept, "drawn": verdict.style, "confidence": round(verdict.confidence, 4)}
        for verdict in judge.judge_pictures(images)
    ]
