"""Fewer and cheaper evaluations of the network: what trades a little quality for time, each chosen by name.

    spacing             another distribution of the steps over the noise levels, for fewer of them (`path.SPACINGS`)
    guidance_interval   guidance only between two labels (Kynkäänniemi et al., arXiv 2404.07724)
    uncond_interval     the unconditional branch every n-th step; in between its last difference guides on
                        (FasterCache, Lv et al., arXiv 2410.19355, reuses the unconditional branch in the same manner)
    cache_interval      the inner part of the U every n-th step; in between only its outer blocks, fed by the long skips
                        (DeepCache, Ma et al., arXiv 2312.00858, on a U-ViT)

The first two and the third are data of the path and of the guidance rule; the last is `DeepCache` here, a network around
the network. Nothing of it is on unless asked for; `PRESETS` names combinations whose price was measured
(`python -m unidiffuser.emoji.studies.quality`).
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
WEAKER = 0.8  # of the paper's scale: with few steps the same guidance overshoots


def _fast(usual: Mapping[str, Any]) -> dict[str, Any]:
    """Half the evaluations: half the model's steps, closer together where little noise is left, and less guidance."""
    scales = usual["guidance"]
    weaker = [1 + WEAKER * (g - 1) for g in (scales if isinstance(scales, Sequence) else (scales,))]
    return {
        "steps": max(1, usual["steps"] // 2),
        "spacing": "logsnr",
        "guidance": tuple(weaker) if isinstance(scales, Sequence) else weaker[0],
    }


Preset = Callable[[Mapping[str, Any]], Mapping[str, Any]]
PRESETS: Mapping[str, Preset] = {EXACT: lambda usual: {}, "fast": _fast}
"""Names for options of a call (see `options.Options`), made from a model's usual ones; what a caller gives goes before."""


class DeepCache(nn.Module):
    """A U-ViT that computes the inside of its U at every n-th call and takes it from the last such call in between.

    For one run of one sampler: the calls are counted, and what is kept is of the last batch. A batch of other evaluations
    than those kept (guidance that sets in on the way) is computed in full.

    Args:
        net: the network.
        interval: a full evaluation every `interval` calls; 1 keeps nothing.
        branch: how many of the outermost levels are always computed, at least 1: a level is a pair of blocks with the
            long skip between them.

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
        self.kept: Tensor | None = None  # (B, tokens, D)
        self.kinds: Tensor | None = None  # (B, 2), which evaluations they were

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
        if fresh or self.kept is None:
            self.kept, self.kinds = self._inside(x), kinds
        x = self.kept[: len(x)]
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
        """Whether what is kept begins with the evaluations that are wanted now."""
        if self.kinds is None or len(self.kinds) < len(kinds):
            return False
        return torch.equal(self.kinds[: len(kinds)], kinds)


class Compiled(nn.Module):
    """A network under torch.compile, which goes on without it where that fails.

    Exact up to the order of sums. The first call for each shape takes a minute or more.

    Args:
        net: the network.
        mode: of COMPILE_MODES, which are torch.compile's: "default"; "reduce-overhead" records CUDA graphs, which pays at
            small batches; "max-autotune" tries kernels out.
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
                # A recorded graph writes every result to one place, and the sampler keeps some of them: hence the copies.
                img, clip_img, text = (None if x is None else x.clone() for x in self.compiled(*args, **kwargs))
                return img, clip_img, text
            except Exception as error:  # a compiler that is not there, or does not know the device, raises almost anything
                log.warning("torch.compile failed (%s); going on without it", str(error).strip().splitlines()[0])
                self.compiled = None
        out: Predictions = self.net(*args, **kwargs)
        return out
