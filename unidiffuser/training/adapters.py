"""Low-rank adapters (Hu et al., arXiv 2106.09685, by peft) on a network and its caption decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoders.captions import CaptionDecoder
from ..runtime.lora import Change
from ..streams import Streams
from ..uvit import UViT
from .stage import seeded_init

Noise = tuple[Tensor, Tensor, Tensor]
"""Predicted noise of img (B, C, H, W), clip_img (B, 1, D) and text (B, L, d)."""
DECODER_LAYERS = r".*\.(c_attn|c_proj|c_fc)"
"""Adapted layers of the caption decoder: every matrix of its blocks. Its `encode_prefix` makes the text latents that the
network was trained on, so it stays as it is."""


class Predictions(NamedTuple):
    """What `AdaptedModel` returns for B pairs, the last M of them prior samples.

    Attributes:
        noise: predicted noise of all B pairs.
        prior_noise: of the M prior samples, predicted without adapters.
        logits: (B, T, V) of the caption decoder; None without one.
        prior_logits: (M, T, V), without adapters; None without a caption decoder.
    """

    noise: Noise
    prior_noise: Noise
    logits: Tensor | None
    prior_logits: Tensor | None


class AdaptedModel(nn.Module):
    """A frozen network, and a caption decoder if given, with trainable adapters that can be switched off.

    Args:
        network: float32; it is changed in place.
        captioner: the caption decoder, likewise, or None.
        rank: of the adapters.
        seed: of their initial values.

    Raises:
        ValueError: peft is not installed.
    """

    def __init__(self, network: UViT, captioner: CaptionDecoder | None, rank: int, seed: int):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ValueError("training a LoRA needs peft, which is not installed here: pip install peft") from error
        self.network = network.requires_grad_(False)
        self.captioner = None if captioner is None else captioner.requires_grad_(False)
        self.rank = rank
        with seeded_init(seed):
            for part, module in self.parts():
                layers = DECODER_LAYERS if part == "caption" else _matrices(module)
                config = LoraConfig(
                    r=rank, lora_alpha=rank, target_modules=layers, fan_in_fan_out=part == "caption"
                )  # alpha = rank: the change is up @ down and nothing else
                inject_adapter_in_model(config, module)
        self._adapters: list[Any] = [module for module in self.modules() if isinstance(module, LoraLayer)]

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The adapted modules with the names of their checkpoint parts, "uvit" and "caption"."""
        both = [("uvit", self.network), ("caption", self.captioner)]
        return [(name, module) for name, module in both if module is not None]

    def train(self, mode: bool = True) -> AdaptedModel:
        """Always in evaluation mode: GPT-2's dropout would change its output without any training."""
        return super().train(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapters off inside the block."""
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)

    def forward(
        self, learned: int, noised: Streams, t_img: Tensor, t_text: Tensor, latents: Tensor, tokens: Tensor
    ) -> Predictions:
        """Predictions for `learned` pairs and, after them, prior samples; for the latter also without adapters.

        Args:
            learned: how many of the B pairs are to be learned; the others are prior samples.
            noised: (B, ...) streams.
            t_img, t_text: (B,) labels 0..1000.
            latents: (B, L, d) noisy text latents for the caption decoder.
            tokens: (B, T) target captions.
        """
        with torch.no_grad(), self.disabled():
            prior = noised.map(lambda x: x[learned:])
            prior_noise = self.network(prior.img, prior.clip_img, prior.text, t_img[learned:], t_text[learned:])
            prior_logits = None if self.captioner is None else self.captioner(latents[learned:], tokens[learned:].clamp_min(0))
        noise = self.network(noised.img, noised.clip_img, noised.text, t_img, t_text)
        logits = None if self.captioner is None else self.captioner(latents, tokens.clamp_min(0))
        return Predictions(noise, prior_noise, logits, prior_logits)

    def changes(self) -> dict[str, dict[str, Change]]:
        """The trained adapters, by checkpoint part and layer."""
        from peft.tuners.lora import LoraLayer

        def weight(matrices: Any) -> Tensor:
            (linear,) = matrices.values()
            matrix: Tensor = linear.weight
            return matrix.detach().float().cpu().clone()

        return {
            part: {
                name: Change(weight(layer.lora_A), weight(layer.lora_B))
                for name, layer in module.named_modules()
                if isinstance(layer, LoraLayer)
            }
            for part, module in self.parts()
        }


def _matrices(network: nn.Module) -> list[str]:
    """Names of a network's linear layers and convolutions.

    The layers that read and write latents are among them: with the matrices of the transformer blocks alone, the bundled
    network draws a new thing with hardly an outline.
    """
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
