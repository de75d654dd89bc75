"""Training of the judge on real pictures of the `train` split, and its accuracy on all splits.

The concept classifier is trained on pictures of its concepts in any style, with strong augmentation of colour and shading (what
differs between styles), feature statistics of other pictures, and mild moves and scaling. The style classifier is trained on
all real pictures of the split, of other concepts too, with almost no change of colour. Otherwise the concept would predict
the style: a held-out pair has the one style in which its concept is never seen. Both get some slightly blurred or noisy
pictures, like those an autoencoder returns.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data.captioned import Pair
from ..evaluation.digests import file_digest
from ..evaluation.metrics import success_rate
from ..evaluation.sources import in_split, read_folder
from ..media.images import to_tensor
from ..runtime.precision import multiplies_bf16
from ..streams import draw_normal, draw_uniform
from ..training.augment import hue_turn, moved, softened
from .judge import CONCEPT_SIDE, SIDE, Judge, at_side, load_judge
from .restyle import Restyle

log = logging.getLogger(__name__)

RESTYLED = 0.6  # fraction of the pictures that get the feature statistics of another
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def train_judge(
    pairs: Sequence[Pair],
    *,
    concept_steps: int = 1800,
    style_steps: int = 3000,
    concept_batch: int = 88,
    style_batch: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    start: Judge | None = None,
    progress: bool = True,
) -> Judge:
    """Train a judge on the `train` split: AdamW, warm-up and cosine decay, bfloat16 where the CPU multiplies it.

    The two classifiers have no weights in common and are trained one after the other, each from the seed.

    Args:
        pairs: with the fields `label`, `style`, `split` and `demo`, which is true for the concepts and styles to classify; an
            optional field `known` is true for more pictures of these concepts, in any style.
        concept_steps, style_steps: training steps of each classifier; 0 leaves it as it is.
        concept_batch, style_batch: batch sizes.
        learning_rate: at the end of the warm-up.
        seed: of the initial weights, the order and the augmentation.
        start: a judge to continue from; it is copied.
        progress: bars on stderr.

    Raises:
        ValueError: `start` has other concepts or styles than the pairs.
    """
    every = in_split(pairs, "train")
    judged = [pair for pair in every if pair.fields.get("demo")]
    labels, styles = _in_order(pair.label for pair in judged), _in_order(pair.style for pair in judged)
    judge = _initialised(labels, styles, seed) if start is None else copy.deepcopy(start)
    if set(judge.labels) != set(labels) or set(judge.styles) != set(styles):
        raise ValueError("the judge to continue from has other concepts or styles than these pictures; train a new one")
    judge.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # missing in torch's stubs
    bar = partial(tqdm, disable=not progress)
    if concept_steps:
        known = [pair for pair in every if pair.fields.get("known", pair.fields.get("demo"))]
        log.info("%d pictures of %d concepts", len(known), len(labels))
        _train_concepts(judge, known, concept_batch, seed, bar(range(concept_steps), "concepts"), learning_rate)
    if style_steps:
        styled = [pair for pair in every if pair.style in styles]
        log.info("%d pictures of %d styles", len(styled), len(styles))
        _train_styles(judge, styled, style_batch, seed, bar(range(style_steps), "styles"), learning_rate)
    return judge.eval()


def _initialised(labels: Sequence[str], styles: Sequence[str], seed: int) -> Judge:
    with torch.random.fork_rng(devices=[]):  # torch draws its own initial weights globally; they are replaced
        judge = Judge(labels, styles)
    initialise(judge, torch.Generator().manual_seed(seed))
    return judge


def _train_concepts(judge: Judge, pairs: Sequence[Pair], batch: int, seed: int, steps: tqdm[int], learning_rate: float) -> None:
    images, targets = stacked(pairs, CONCEPT_SIDE), torch.tensor([judge.labels.index(p.label) for p in pairs])
    generator = torch.Generator().manual_seed(seed)
    restyle = Restyle()

    def draw_batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(pairs), (batch,), generator=generator, device=generator.device)
        return augment(as_float(images, chosen), generator), targets[chosen]

    def logits(pictures: Tensor) -> Tensor:
        with restyle.during(RESTYLED, generator):
            return judge.concept_logits(pictures)

    hook = judge.stem.register_forward_hook(restyle)
    modules = [judge.stem, judge.concept_body, judge.concept_head]
    _optimise(modules, draw_batch, logits, steps, learning_rate, label_smoothing=0.1)
    hook.remove()


def _train_styles(judge: Judge, pairs: Sequence[Pair], batch: int, seed: int, steps: tqdm[int], learning_rate: float) -> None:
    images, targets = stacked(pairs, SIDE), torch.tensor([judge.styles.index(p.style) for p in pairs])
    generator = torch.Generator().manual_seed(seed)

    def draw_batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(pairs), (batch,), generator=generator, device=generator.device)
        return augment(as_float(images, chosen), generator, colour=0.15), targets[chosen]

    _optimise([judge.strokes, judge.style_head], draw_batch, judge.style_logits, steps, learning_rate)


def _optimise(
    modules: Sequence[torch.nn.Module],
    draw_batch: Callable[[], tuple[Tensor, Tensor]],
    logits: Callable[[Tensor], Tensor],
    steps: tqdm[int],
    learning_rate: float,
    *,
    label_smoothing: float = 0.0,
) -> None:
    """AdamW on some modules, weight decay on matrices only, learning rate with warm-up and cosine decay."""
    weights = [p for module in modules for p in module.parameters()]
    decayed, others = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=learning_rate
    )
    count = len(steps)
    warm_up = max(1, count // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / count))
    )
    with steps:
        for _ in steps:
            pictures, targets = draw_batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
                predicted = logits(pictures)
            loss = F.cross_entropy(predicted.float(), targets, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def initialise(judge: Judge, generator: torch.Generator) -> None:
    """Draw the initial weights (He et al. 2015) from `generator`, so that the seed determines them."""
    for module in judge.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            spread = math.sqrt(2.0 / module.weight[0].numel()) if isinstance(module, torch.nn.Conv2d) else 0.02
            with torch.no_grad():
                module.weight.normal_(0.0, spread, generator=generator)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def stacked(pairs: Sequence[Pair], side: int, chunk: int = 256) -> Tensor:
    """The pictures at (side, side) as uint8: (B, 3, side, side); `chunk` of them are opened at a time."""
    parts = [pairs[start : start + chunk] for start in range(0, len(pairs), chunk)]
    resized = [at_side(to_tensor([pair.image() for pair in part]), side) for part in parts]
    return torch.cat([((x + 1) * 127.5).round().to(torch.uint8) for x in resized])


def as_float(images: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
    """Chosen ones of `stacked` pictures, as floats in [-1, 1]."""
    return images[chosen].float() / 127.5 - 1


def augment(images: Tensor, generator: torch.Generator, *, colour: float = 1.0, place: float = 0.6) -> Tensor:
    """Augment pictures (B, 3, S, S) in [-1, 1], each differently: move, recolour, shade, blur, add noise.

    Args:
        images: pictures.
        generator: of all random numbers.
        colour: strength of the changes of colour, shading and noise; 1 rotates the hue by up to 0.4 rad.
        place: strength of the moves; 1 shifts by up to 7.5 % of the side and rotates by up to 0.25 rad.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return draw_uniform((count,), generator) * (high - low) + low

    def sometimes(high: float) -> Tensor:
        """0 for half of the pictures, up to `high` for the others: (B, 1, 1, 1)."""
        return ((draw_uniform((count,), generator) < 0.5) * uniform(0.0, high))[:, None, None, None]

    # Place: rotation, zoom, stretch, shear, shift; the outside is white.
    turn, shear = uniform(-0.25, 0.25) * place, uniform(-0.15, 0.15) * place
    zoom, stretch = torch.exp(uniform(-0.25, 0.2) * place), torch.exp(uniform(-0.15, 0.15) * place)
    x = moved(images, turn, shear, zoom, stretch, uniform(-0.15, 0.15) * place, uniform(-0.15, 0.15) * place)

    # Colour: saturation, then hue rotation, then contrast and brightness.
    saturation = (1.0 + colour * uniform(-0.5, 0.5))[:, None, None]
    turned = hue_turn(colour * uniform(-0.4, 0.4))
    recolour = turned @ (saturation * torch.eye(3) + (1.0 - saturation) * torch.tensor(LUMA).expand(3, 3))
    contrast = (1.0 + colour * uniform(-0.25, 0.2))[:, None, None, None]
    x = torch.einsum("bij,bjhw->bihw", recolour, x) * contrast + colour * uniform(-0.15, 0.15)[:, None, None, None]

    # Shading across the picture, like the gradients of some styles.
    slope = draw_normal((count, 2, 1, 1), generator) * 0.15 * colour
    line = torch.linspace(-1.0, 1.0, x.shape[-1])
    x = x + (slope[:, 0] * line[None, None, :] + slope[:, 1] * line[None, :, None])[:, None]

    # Blur of up to half the resolution, and noise.
    x = torch.lerp(x, softened(x), sometimes(1.0).expand_as(x))
    x = x + sometimes(0.15) * (0.3 + 0.7 * colour) * draw_normal(x.shape, generator)
    return x.clamp(-1.0, 1.0)


def accuracy_report(judge: Judge, pairs: Sequence[Pair]) -> list[str]:
    """Lines with the judge's accuracy on real pictures of its concepts, by split, unchanged and blurred.

    The blur keeps 16 x 16 pixels: the accuracy on it shows how little the judge depends on sharpness.
    """
    known = [pair for pair in pairs if pair.label in judge.labels and pair.style in judge.styles]
    lines = []
    for split in _in_order(pair.split for pair in known):
        part = in_split(known, split)
        images = as_float(stacked(part, SIDE))
        blurred = F.interpolate(F.adaptive_avg_pool2d(images, 16), size=SIDE, mode="bilinear", align_corners=False)
        for name, pictures in ((split, images), (f"{split}, blurred to 16 px", blurred)):
            verdicts = judge.judge(pictures)
            concept = success_rate([[v.label == e.label for v, e in zip(verdicts, part, strict=True)]])
            style = success_rate([[v.style == e.style for v, e in zip(verdicts, part, strict=True)]])
            lines.append(f"{name}: concept {concept}; style {style}")
    return lines


def _in_order(values: Iterable[str]) -> list[str]:
    """Distinct values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unidiffuser.emoji.judge_training",
        description="Train the judge on real pictures and report its accuracy.",
    )
    parser.add_argument("--data", type=Path, required=True, help="image folder made by `python -m unidiffuser.emoji prepare`")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--concept-steps", type=int, default=1800, help="training steps of the concept classifier; 0 leaves it as it is"
    )
    parser.add_argument("--style-steps", type=int, default=3000, help="likewise for styles")
    parser.add_argument("--start", type=Path, help="continue training this judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="only report the accuracy of the judge in --out")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pairs = list(read_folder(options.data))
    if not options.report:
        start = load_judge(options.start) if options.start else None
        steps = {"concept_steps": options.concept_steps, "style_steps": options.style_steps}
        train_judge(pairs, **steps, seed=options.seed, start=start).save(options.out)
    judge = load_judge(options.out)
    for line in accuracy_report(judge, pairs):
        log.info("%s", line)
    log.info("%s: %d bytes, SHA-256 %s", options.out, options.out.stat().st_size, file_digest(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
