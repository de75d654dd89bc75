"""Low-rank adapters (Hu et al., arXiv 2106.09685, by peft) on a network and its caption decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..encoders.captions import CaptionDecoder
from ..runtime.lora import Change
from ..uvit import UViT
from .changing_model import ChangingModel
from .stage import seeded_init

DECODER_LAYERS = r".*\.(c_attn|c_proj|c_fc)"
"""Adapted layers of the caption decoder: every matrix of its blocks. Its `encode_prefix` makes the text latents that the
network was trained on, so it stays as it is."""


class AdaptedModel(ChangingModel):
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

    @contextmanager
    def before(self) -> Iterator[tuple[UViT, CaptionDecoder | None]]:
        with self.disabled():
            yield self.network, self.captioner

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
