"""Training of the judge on real pictures of the ``train`` split, and its accuracy on all splits.

The concept is learnt from pictures of the concepts in question, in styles beyond the judged ones where there are any, with
strong changes of colour and shading (what differs between styles), feature statistics of other pictures, and mild changes of
place and size. The style is learnt from all real pictures of the split, other concepts too,
with hardly a change of colour. Otherwise a concept would tell its style: the style in which a pair is held out is just the
one that its concept is never seen in. Both see some pictures a little soft or noisy, as an autoencoder returns them.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data.captioned import Pair
from ..evaluation.metrics import success_rate
from ..evaluation.sources import in_split
from ..media.images import to_tensor
from ..runtime.precision import multiplies_bf16
from ..training.augment import hue_turn, moved, softened
from .judge import CONCEPT_SIDE, SIDE, Judge, at_side
from .restyle import Restyle

log = logging.getLogger(__name__)

RESTYLED = 0.6  # share of the pictures whose concept is learnt with the statistics of another
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
    """A judge trained on the ``train`` split; AdamW, warm-up and cosine decay, bfloat16 where the CPU multiplies it.

    Its two halves share nothing, so they are trained one after the other, each from the seed.

    Args:
        pairs: with the fields ``label``, ``style``, ``split`` and ``demo``, true for the concepts and styles that it shall
            tell apart; ``known``, where it is there, is true for more pictures of these concepts, in any style.
        concept_steps, style_steps: training steps of each half; a half with none stays as it begins.
        concept_batch, style_batch: pictures of a step.
        learning_rate: at the end of the warm-up.
        seed: of the start weights, the order and the changes.
        start: goes on learning, on a copy.
        progress: bars on stderr.

    Raises:
        ValueError: ``start`` tells other concepts or styles than the pairs have.
    """
    every = in_split(pairs, "train")
    judged = [pair for pair in every if pair.fields.get("demo")]
    labels, styles = _in_order(e.label for e in judged), _in_order(e.style for e in judged)
    judge = _beginning(labels, styles, seed) if start is None else copy.deepcopy(start)
    if set(judge.labels) != set(labels) or set(judge.styles) != set(styles):
        raise ValueError("the judge to go on from tells other concepts or styles than these pictures have; train a new one")
    judge.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # missing in torch's stubs
    bar = partial(tqdm, disable=not progress)

    if concept_steps:
        known = [pair for pair in every if pair.fields.get("known", pair.fields.get("demo"))]
        log.info("%d pictures of %d concepts", len(known), len(labels))
        images, targets = stacked(known, CONCEPT_SIDE), torch.tensor([judge.labels.index(e.label) for e in known])
        generator = torch.Generator().manual_seed(seed)
        restyle = Restyle()

        def things() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(known), (concept_batch,), generator=generator)
            return augment(of(images, rows), generator), targets[rows]

        def said(shown: Tensor) -> Tensor:
            with restyle.during([(slice(None), RESTYLED)], generator):
                return judge.concept_logits(shown)

        hook = judge.stem.register_forward_hook(restyle)
        half = [judge.stem, judge.concept_body, judge.concept_head]
        _fit(half, things, said, bar(range(concept_steps), "concepts"), learning_rate, label_smoothing=0.1)
        hook.remove()

    if style_steps:
        drawn = [pair for pair in every if pair.style in styles]
        log.info("%d pictures of %d styles", len(drawn), len(styles))
        drawings, kinds = stacked(drawn, SIDE), torch.tensor([judge.styles.index(e.style) for e in drawn])
        chance = torch.Generator().manual_seed(seed)

        def drawn_so() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(drawn), (style_batch,), generator=chance)
            return augment(of(drawings, rows), chance, colour=0.15), kinds[rows]

        half = [judge.strokes, judge.style_head]
        _fit(half, drawn_so, judge.style_logits, bar(range(style_steps), "styles"), learning_rate)
    return judge.eval()


def _beginning(labels: Sequence[str], styles: Sequence[str], seed: int) -> Judge:
    with torch.random.fork_rng(devices=[]):  # torch's own start weights are drawn globally, then replaced
        judge = Judge(labels, styles)
    initialise(judge, torch.Generator().manual_seed(seed))
    return judge


def _fit(
    half: Sequence[torch.nn.Module],
    examples: Callable[[], tuple[Tensor, Tensor]],
    logits: Callable[[Tensor], Tensor],
    steps: tqdm[int],
    learning_rate: float,
    *,
    label_smoothing: float = 0.0,
) -> None:
    """Steps of AdamW on a half of the judge; matrices decay, the learning rate warms up and falls as a cosine."""
    weights = [p for part in half for p in part.parameters()]
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
            shown, targets = examples()
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
                said = logits(shown)
            loss = F.cross_entropy(said.float(), targets, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def initialise(judge: Judge, generator: torch.Generator) -> None:
    """Draw the start weights (He et al. 2015) from a generator of our own, so that a seed says all."""
    for module in judge.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            spread = math.sqrt(2.0 / module.weight[0].numel()) if isinstance(module, torch.nn.Conv2d) else 0.02
            with torch.no_grad():
                module.weight.normal_(0.0, spread, generator=generator)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def stacked(examples: Sequence[Pair], side: int, chunk: int = 256) -> Tensor:
    """The pictures at (side, side), as bytes: (B, 3, side, side)."""
    parts = [examples[start : start + chunk] for start in range(0, len(examples), chunk)]
    at = [at_side(to_tensor([e.image() for e in part]), side) for part in parts]
    return torch.cat([((x + 1) * 127.5).round().to(torch.uint8) for x in at])


def of(images: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """Rows of `stacked` pictures in [-1, 1]."""
    return images[rows].float() / 127.5 - 1


def augment(images: Tensor, generator: torch.Generator, *, colour: float = 1.0, place: float = 0.6) -> Tensor:
    """Each picture of (B, 3, S, S) in [-1, 1] moved, recoloured, shaded, softened and made noisy in its own way.

    Args:
        colour: strength of the changes of colour, shading and noise; 1 turns the hue by up to 0.4 rad.
        place: strength of the moves; 1 shifts by up to 7.5 % of the side and turns by up to 0.25 rad.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def sometimes(high: float) -> Tensor:
        """0 for half of the pictures, else up to ``high``: (B, 1, 1, 1)."""
        return ((torch.rand(count, generator=generator) < 0.5) * uniform(0.0, high))[:, None, None, None]

    # Where: turn, zoom, stretch, shear, shift; what comes in from outside is white.
    turn, shear = uniform(-0.25, 0.25) * place, uniform(-0.15, 0.15) * place
    zoom, stretch = torch.exp(uniform(-0.25, 0.2) * place), torch.exp(uniform(-0.15, 0.15) * place)
    x = moved(images, turn, shear, zoom, stretch, uniform(-0.15, 0.15) * place, uniform(-0.15, 0.15) * place)

    # Colour: saturation, then a turn of the hue, then contrast and brightness.
    saturation = (1.0 + colour * uniform(-0.5, 0.5))[:, None, None]
    turned = hue_turn(colour * uniform(-0.4, 0.4))
    recolour = turned @ (saturation * torch.eye(3) + (1.0 - saturation) * torch.tensor(LUMA).expand(3, 3))
    contrast = (1.0 + colour * uniform(-0.25, 0.2))[:, None, None, None]
    x = torch.einsum("bij,bjhw->bihw", recolour, x) * contrast + colour * uniform(-0.15, 0.15)[:, None, None, None]

    # Shading across the picture, the gradient that some styles have and others lack.
    slope = torch.randn(count, 2, 1, 1, generator=generator) * 0.15 * colour
    line = torch.linspace(-1.0, 1.0, x.shape[-1])
    x = x + (slope[:, 0] * line[None, None, :] + slope[:, 1] * line[None, :, None])[:, None]

    # Softness of up to half the resolution, and noise.
    x = torch.lerp(x, softened(x), sometimes(1.0).expand_as(x))
    x = x + sometimes(0.15) * (0.3 + 0.7 * colour) * torch.randn(x.shape, generator=generator)
    return x.clamp(-1.0, 1.0)


def accuracy_report(judge: Judge, pairs: Sequence[Pair]) -> list[str]:
    """Lines on how often the judge is right about real pictures of its concepts, by split, as they are and as a blur.

    The blur keeps 16 x 16 pixels: a judge that still knows a picture by them says little about sharpness.
    """
    examples = [pair for pair in pairs if pair.label in judge.labels and pair.style in judge.styles]
    lines = []
    for split in _in_order(example.split for example in examples):
        part = in_split(examples, split)
        images = of(stacked(part, SIDE))
        blurred = F.interpolate(F.adaptive_avg_pool2d(images, 16), size=SIDE, mode="bilinear", align_corners=False)
        for name, shown in ((split, images), (f"{split}, blurred to 16 px", blurred)):
            verdicts = judge.judge(shown)
            concept = success_rate([[v.label == e.label for v, e in zip(verdicts, part, strict=True)]])
            style = success_rate([[v.style == e.style for v, e in zip(verdicts, part, strict=True)]])
            lines.append(f"{name}: concept {concept}; style {style}")
    return lines


def _in_order(values: Iterable[str]) -> list[str]:
    """Distinct values in the order of their first appearance."""
    return list(dict.fromkeys(values))
