"""A U-ViT with large patches: it can predict a mixture of picture and noise, and refine its patches with convolutions.

The bundled model is one of these. `build` chooses the class by the checkpoint's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..uvit import AttentionFunction, Label, UViT, UViTConfig, default_attention, initialise_linear, unpatchify
from .detail import FOLD, DetailHead, noise_of_output


@dataclass(frozen=True)
class PictureUViTConfig(UViTConfig):
    """Sizes of a `PictureUViT`.

    Attributes:
        sigma_data: the image head predicts a mixture of picture and noise, see `noise_of_output`; None predicts the noise.
        detail_width: width of a `DetailHead`; 0 for none.
        detail_blocks: its blocks at half the latent resolution.
        detail_features: outputs of each patch that condition it.
        detail_inner, detail_inner_blocks: width (0 for none) and blocks of its level at a quarter of the resolution.
        detail_told: size of the conditioning vector made from the image's time token for all its blocks; 0 for none.
    """

    sigma_data: float | None = None
    detail_width: int = 0
    detail_blocks: int = 2
    detail_features: int = 24
    detail_inner: int = 0
    detail_inner_blocks: int = 4
    detail_told: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data is not None and not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be above 0, or None for a network that predicts noise, not {self.sigma_data}.")
        fold = FOLD**2 if self.detail_inner else FOLD
        if self.detail_width and self.patch_size % fold:
            raise ValueError(f"patch_size {self.patch_size} must be a multiple of {fold} for this detail head.")
        if not self.detail_width and (self.detail_inner or self.detail_told):
            raise ValueError("detail_inner and detail_told belong to a detail head; give it a detail_width.")

    @property
    def patch_values(self) -> int:
        """Outputs of the image head for each patch: with a detail head a coarse latent at half the side, and features."""
        if not self.detail_width:
            return super().patch_values
        return (self.patch_size // FOLD) ** 2 * (FOLD**2 * self.in_chans + self.detail_features)


class PictureUViT(UViT):
    """A U-ViT whose image head is that of a `PictureUViTConfig`; it returns the noise like any other."""

    config: PictureUViTConfig

    def __init__(
        self,
        config: PictureUViTConfig,
        operations: Any = nn,
        attention: AttentionFunction = default_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, operations, attention, device, dtype)
        self.detail: DetailHead | None = None
        if config.detail_width:
            self.detail = DetailHead(
                config.in_chans, config.detail_features, config.detail_width, config.detail_blocks, operations,
                inner=config.detail_inner, inner_blocks=config.detail_inner_blocks, token=config.embed_dim,
                cond=config.detail_told, device=device, dtype=dtype,
            )  # fmt: skip
            if operations is nn:  # the convolutions start by adding nothing to the patches
                self.detail.apply(initialise_linear).start_from_coarse_prediction()

    def image(self, patches: Tensor, times: Tensor, img: Tensor, t_img: Label) -> Tensor:
        side, size = self.config.patch_size, img.shape[2:]
        if self.detail is None:
            x = unpatchify(patches, side, size)
        else:
            coarse = unpatchify(patches, side // FOLD, [length // FOLD for length in size])
            x = self.detail(img, coarse, self.norm(times[:, 0]))
        if self.config.sigma_data is None:
            return x
        return noise_of_output(x, img, torch.as_tensor(t_img, device=img.device).expand(len(img)), self.config.sigma_data)


def config_of(values: Mapping[str, Any]) -> UViTConfig:
    """The config with these fields: a `PictureUViTConfig` if they have `sigma_data` or `detail_width`, else a `UViTConfig`."""
    kind = PictureUViTConfig if values.get("sigma_data") is not None or values.get("detail_width") else UViTConfig
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def build(config: UViTConfig, **arguments: Any) -> UViT:
    """The network of a config; `arguments` as for `UViT`."""
    if isinstance(config, PictureUViTConfig):
        return PictureUViT(config, **arguments)
    return UViT(config, **arguments)


def predicts_noise(config: UViTConfig) -> bool:
    """Whether the image head predicts the noise itself, as published networks do."""
    return not isinstance(config, PictureUViTConfig) or config.sigma_data is None
