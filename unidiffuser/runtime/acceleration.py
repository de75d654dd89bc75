"""Acceleration: options that trade a little quality for fewer or cheaper network evaluations, and torch.compile.

    spacing             spacing of the steps over the noise levels (`path.SPACINGS`), for fewer steps
    guidance_interval   guidance only between two labels (Kynkäänniemi et al., arXiv 2404.07724)
    cache_interval      the inner blocks of the U at every n-th step only; in between the outer blocks run with the cached
                        inner result (DeepCache, Ma et al., arXiv 2312.00858, on a U-ViT)

The first two belong to the path and to the guidance rule; the last is `DeepCache`, a wrapper around the network. All are off by
default; `PRESETS` names combinations whose effect on quality was measured (docs/speed.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..uvit import HEADS, Predictions, UViT

log = logging.getLogger(__name__)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
EXACT = "exact"
WEAKER = 0.8  # times the paper's scale: with few steps the full one overshoots


def _fast(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Half the model's steps, denser where little noise is left, and weaker guidance."""
    scales = defaults["guidance"]
    weaker = [1 + WEAKER * (g - 1) for g in (scales if isinstance(scales, Sequence) else (scales,))]
    return {
        "steps": max(1, defaults["steps"] // 2),
        "spacing": "logsnr",
        "guidance": tuple(weaker) if isinstance(scales, Sequence) else weaker[0],
    }


Preset = Callable[[Mapping[str, Any]], Mapping[str, Any]]
PRESETS: Mapping[str, Preset] = {EXACT: lambda defaults: {}, "fast": _fast}
"""Named sets of options (see `options.Options`), made from a model's defaults; options given in a call take precedence."""


class DeepCache(nn.Module):
    """A U-ViT that computes the inner levels of its U at every n-th call and reuses the cached result in between.

    For one run of one sampler: calls are counted and the cache holds the last full batch. A batch of evaluations that the cache
    does not cover (guidance that starts on the way) is computed in full.

    Args:
        net: the network.
        interval: one full evaluation in `interval` calls; 1 caches nothing.
        branch: number of outer levels that are always computed, at least 1. A level is a pair of blocks with a long skip.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, net: UViT, interval: int, branch: int = 1):
        super().__init__()
        levels = net.config.depth // 2
        if interval < 1:
            raise ValueError(f"cache_interval must be at least 1 (1 = off), not {interval}.")
        if not 1 <= branch <= levels:
            raise ValueError(f"cache_branch must be between 1 and {levels} for this network, not {branch}.")
        self.net, self.config = net, net.config
        self.interval, self.branch = interval, branch
        self.calls = 0
        self.cached: Tensor | None = None  # (B, N, D)
        self.kinds: Tensor | None = None  # (B, 2), the evaluations it belongs to

    def forward(
        self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor,
        data_type: Tensor | int | None = None, heads: Sequence[str] = HEADS,
    ) -> Predictions:  # fmt: skip
        """As `UViT.forward`, with labels (B,)."""
        net = self.net
        net.config.check(img, clip_img, text, data_type, heads)
        # Guidance's branches differ from the first, the conditional one, in a label: that tells them from one another.
        kinds = torch.stack((t_img == t_img[0], t_text == t_text[0]), dim=1)
        fresh = self.calls % self.interval == 0 or not self._covers(kinds)
        self.calls += 1

        x, skips = net.embed(img, clip_img, text, t_img, t_text, data_type), []
        for block in net.in_blocks[: self.branch]:
            skips.append(x := block(x))
        if fresh or self.cached is None:
            self.cached, self.kinds = self._inside(x), kinds
        x = self.cached[: len(x)]
        for block in net.out_blocks[len(net.out_blocks) - self.branch :]:
            x = block(x, skips.pop())
        return net.read(x, img, t_img, heads)

    def _inside(self, x: Tensor) -> Tensor:
        """The inner levels of the U, which are computed at every n-th call only."""
        skips = []
        for block in self.net.in_blocks[self.branch :]:
            skips.append(x := block(x))
        x = self.net.mid_block(x)
        for block in self.net.out_blocks[: len(self.net.out_blocks) - self.branch]:
            x = block(x, skips.pop())
        return x

    def _covers(self, kinds: Tensor) -> bool:
        """Whether the cache begins with the evaluations of this call."""
        if self.kinds is None or len(self.kinds) < len(kinds):
            return False
        return torch.equal(self.kinds[: len(kinds)], kinds)


class Compiled(nn.Module):
    """A network under torch.compile, with a fallback to the plain network where compilation fails.

    Equal up to the order of sums. The first call for each shape takes a minute or more.

    Args:
        net: the network.
        mode: of COMPILE_MODES, which are torch.compile's: "default"; "reduce-overhead" records CUDA graphs, which helps
            small batches; "max-autotune" benchmarks kernels.
    """

    def __init__(self, net: UViT, mode: str = "default"):
        super().__init__()
        self.net, self.config = net, net.config
        self.compiled: Callable[..., Predictions] | None = torch.compile(net, mode=mode)

    def forward(self, *args: Any, **kwargs: Any) -> Predictions:
        """As `UViT.forward`."""
        if self.compiled is not None:
            try:
                torch.compiler.cudagraph_mark_step_begin()
                # A recorded graph writes all results to the same memory, and the sampler keeps some of them: hence the copies.
                img, clip_img, text = (None if x is None else x.clone() for x in self.compiled(*args, **kwargs))
                return img, clip_img, text
            except Exception as error:  # a missing compiler or an unknown device can raise almost anything
                log.warning("torch.compile failed (%s); running without it", str(error).strip().splitlines()[0])
                self.compiled = None
        out: Predictions = self.net(*args, **kwargs)
        return out
