"""The streams beside the image latent while a sampler of the host works on the latent (B, 4, H, W).

The host's samplers, guiders and patches see a plain image latent. The CLIP image token, the noise in place of a missing text
and the data type travel in `transformer_options`; the model reads them for each row of a call and leaves its predictions there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .node_warnings import Warnings

SIDE = "unidiffuser"  # key in transformer_options of a `Companion`
POSITIVE, NEGATIVE, REGION = "positive", "negative", "region"  # roles of a condition; a region is a further positive one
Key = tuple[str, int]  # role and index of a condition in its call


@dataclass
class SideStreams:
    """The streams beside the image at one evaluation of a guider, and what the network predicts for them.

    Attributes:
        clip_img: (B, 1, D) CLIP image token at the image's noise level.
        draw_text: fresh noise (B, L, D), for conditions without a text; called at most once.
        image: (B, C, H, W) latent of the evaluation, which tells the items of a part of the batch; None if unknown.
        data_type: data-type token of every item, (B,) or one number; None means curated.
        heads: the heads of the network to compute.
        closed: whether the predictions are complete; further calls belong to patches, which evaluate variants.
    """

    clip_img: Tensor
    draw_text: Callable[[], Tensor]
    image: Tensor | None = None
    data_type: Tensor | int | None = None
    heads: tuple[str, ...] = ("img", "clip_img")
    closed: bool = False
    sums: dict[str, dict[Key, Tensor]] = field(default_factory=dict)
    counts: dict[str, dict[Key, Tensor]] = field(default_factory=dict)
    _text: Tensor | None = None

    @property
    def text_noise(self) -> Tensor:
        """(B, L, D) noise in place of a missing text, the same in all calls of this evaluation."""
        if self._text is None:
            self._text = self.draw_text()
        return self._text

    def places(self, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """Batch item (rows,) and condition index of each row of x (rows, C, h, w).

        x stacks conditions of all items, the whole once or for each of several tiles, or those of one context window.
        """
        indices = list(options.get("cond_or_uncond") or [0])
        batch, rows = len(self.clip_img), len(x)
        period = len(indices) * batch
        period = period if rows % period == 0 else rows
        length = max(period // len(indices), 1)
        within = [row % period for row in range(rows)]
        conditions = [indices[min(row // length, len(indices) - 1)] for row in within]
        window = list(range(batch)) if length % batch == 0 else self._window(x[:length], options)
        return torch.tensor([window[row % length % len(window)] for row in within]), conditions

    def _window(self, x: Tensor, options: dict[str, Any]) -> list[int]:
        """Items of a context window: the host's own or AnimateDiff-Evolved's, else those of the same latents."""
        found = getattr(options.get("context_window"), "index_list", None)
        if found is None:
            found = (options.get("ad_params") or {}).get("sub_idxs")
        if found is not None and len(found) == len(x):
            return [int(i) % len(self.clip_img) for i in found]
        if self.image is None or x.shape[1:] != self.image.shape[1:]:
            return list(range(len(self.clip_img)))
        same = [(self.image == row).flatten(1).all(1).nonzero() for row in x]
        return [int(places[0]) if len(places) else 0 for places in same]

    def kinds(self, items: Tensor, device: torch.device) -> Tensor | None:
        """(rows,) data-type tokens of rows of these items."""
        if self.data_type is None:
            return None
        return torch.as_tensor(self.data_type).to(device).expand(len(self.clip_img))[items.to(device)]

    def collect(self, name: str, predicted: Tensor, keys: Sequence[Key], items: Tensor) -> None:
        """Add the noise predictions (rows, ...) of stream `name`; `keys` has one entry per row."""
        if self.closed:
            return
        sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
        for key in dict.fromkeys(keys):
            rows = torch.tensor([i for i, other in enumerate(keys) if other == key])
            if key not in sums:
                sums[key] = predicted.new_zeros(len(self.clip_img), *predicted.shape[1:])
                counts[key] = torch.zeros(len(self.clip_img))
            sums[key].index_add_(0, items[rows].to(predicted.device), predicted[rows.to(predicted.device)])
            counts[key].index_add_(0, items[rows], torch.ones(len(rows)))

    def predictions(self, name: str) -> dict[Key, Tensor]:
        """(B, ...) noise predictions of a stream by condition, averaged over the rows of each item."""
        means = {}
        for key, total in self.sums.get(name, {}).items():
            count = self.counts[name][key].clamp(min=1).to(total.device)
            means[key] = total / count.view(-1, *[1] * (total.ndim - 1))
        return means


class Companion:
    """What `transformer_options[SIDE]` holds: the `side` of the current evaluation and the run's `notes`.

    Copies of the options share it.
    """

    def __init__(self, side: SideStreams | None = None, notes: Warnings | None = None):
        self.side, self.notes = side, notes or Warnings()

    def __deepcopy__(self, memo: Any) -> Companion:
        return self

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """The time of a run: some patches call the model with options of their own making, which lack the companion."""
        before, model.running = model.running, self
        try:
            yield
            self.notes.finish()
        finally:
            model.running = before


@contextmanager
def closing(options: dict[str, Any], side: SideStreams) -> Iterator[dict[str, Any]]:
    """The time of a guider's evaluation: the predictions of `side` are complete before the pre-cfg functions of patches.

    Yields the model options themselves, not a copy: patches keep their state in them from step to step.
    """
    key = "sampler_pre_cfg_function"
    before = options.get(key)

    def close(arguments: dict[str, Any]) -> Any:
        side.closed = True
        return arguments["conds_out"]

    options[key] = [close, *(before or [])]
    try:
        yield options
    finally:
        options[key] = before or []
    roles = {role for role, _ in side.sums.get("clip_img", ())}
    if roles and not roles & {POSITIVE, REGION}:
        options["transformer_options"][SIDE].notes.warn(
            "No positive prompt is active in some of the steps, which spoils the picture. Let the steps of the last prompt end "
            "at 1, as in 'ConditioningSetTimestepRange'."
        )


def guided(predictions: dict[Key, Tensor], guider: Any) -> Tensor | None:
    """The predictions of all conditions combined by the guider's own formula, without the patches of its cfg.

    Covers the host's guiders: one scale `cfg`, "Dual CFG Guider" and "Perp-Neg Guider". None without predictions, as where a
    cache skips an evaluation.
    """
    if not predictions:
        return None
    positive = _mean([value for (role, _), value in predictions.items() if role in (POSITIVE, REGION)])
    others = [predictions[key] for key in sorted(predictions, key=lambda key: key[1]) if key[0] not in (POSITIVE, REGION)]
    if positive is None:
        return torch.stack(others).mean(0)
    if not others:
        return positive
    cfg = getattr(guider, "cfg", 1.0)
    cfg = float(cfg) if isinstance(cfg, (int, float)) else 1.0
    if hasattr(guider, "cfg1") and hasattr(guider, "cfg2"):
        return _dual(positive, others, guider)
    if hasattr(guider, "neg_scale") and len(others) == 2:
        return _perp_neg(positive, others[0], others[1], float(guider.neg_scale), cfg)
    negative = torch.stack(others).mean(0)
    return negative + cfg * (positive - negative)


def _mean(values: list[Tensor]) -> Tensor | None:
    return torch.stack(values).mean(0) if values else None


def _dual(positive: Tensor, others: list[Tensor], guider: Any) -> Tensor:
    """Of "Dual CFG Guider": its conditions are negative, middle, positive; negative is left out at scale 1."""
    middle = others[-1]
    negative = others[0] if len(others) > 1 else middle
    if getattr(guider, "nested", False):
        inner = middle + guider.cfg1 * (positive - middle)
        return negative + guider.cfg2 * (inner - negative)
    return negative + guider.cfg2 * (middle - negative) + guider.cfg1 * (positive - middle)


def _perp_neg(positive: Tensor, negative: Tensor, empty: Tensor, scale: float, cfg: float) -> Tensor:
    """Of "Perp-Neg Guider" (Armandpour et al., arXiv 2304.04968), for each item."""
    towards, away = positive - empty, negative - empty
    dims = tuple(range(1, towards.ndim))
    along = (away * towards).sum(dims, keepdim=True) / (towards**2).sum(dims, keepdim=True).clamp(min=1e-12)
    return empty + cfg * (towards - scale * (away - along * towards))
