"""A model in training beside itself before training, which prior preservation compares it with."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..encoders.captions import CaptionDecoder
from ..streams import Streams
from ..uvit import UViT

Noise = tuple[Tensor, Tensor, Tensor]
"""Predicted noise of img (B, C, H, W), clip_img (B, 1, D) and text (B, L, d)."""


class Predictions(NamedTuple):
    """What `ChangingModel` returns for B pairs, the last M of them prior samples.

    Attributes:
        noise: predicted noise of all B pairs.
        prior_noise: of the M prior samples, predicted by the model before training.
        logits: (B, T, V) of the caption decoder; None without one.
        prior_logits: (M, T, V), before training; None without a caption decoder.
    """

    noise: Noise
    prior_noise: Noise
    logits: Tensor | None
    prior_logits: Tensor | None


class ChangingModel(nn.Module):
    """A network, and a caption decoder if it is trained too, beside what they were before training.

    Attributes:
        network: in training.
        captioner: likewise, or None.
    """

    network: UViT
    captioner: CaptionDecoder | None

    @abstractmethod
    def before(self) -> AbstractContextManager[tuple[UViT, CaptionDecoder | None]]:
        """Network and caption decoder as they were before training, inside the block."""

    def train(self, mode: bool = True) -> Self:
        """Always in evaluation mode: GPT-2's dropout would change its output without any training."""
        return super().train(False)

    def forward(
        self, learned: int, noised: Streams, t_img: Tensor, t_text: Tensor, latents: Tensor, tokens: Tensor
    ) -> Predictions:
        """Predictions for `learned` pairs and, after them, prior samples; for the latter also by the model before training.

        Args:
            learned: how many of the B pairs are to be learned; the others are prior samples.
            noised: (B, ...) streams.
            t_img, t_text: (B,) labels 0..1000.
            latents: (B, L, d) noisy text latents for the caption decoder.
            tokens: (B, T) target captions.
        """
        with torch.no_grad(), self.before() as (network, captioner):
            prior = noised.map(lambda x: x[learned:])
            prior_noise = network(prior.img, prior.clip_img, prior.text, t_img[learned:], t_text[learned:])
            prior_logits = None if captioner is None else captioner(latents[learned:], tokens[learned:].clamp_min(0))
        noise = self.network(noised.img, noised.clip_img, noised.text, t_img, t_text)
        logits = None if self.captioner is None else self.captioner(latents, tokens.clamp_min(0))
        return Predictions(noise, prior_noise, logits, prior_logits)
