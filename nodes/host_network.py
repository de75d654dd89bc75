"""The U-ViT built with the host's operations, so that the host can move, cast, patch and quantise every weight."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..unidiffuser.small.network import PictureUViT, PictureUViTConfig
from ..unidiffuser.uvit import UViT, UViTConfig
from .host_patches import Patches, transform
from .unet_names import add_unet_names


class HostAttention:
    """The host's attention, or the one that a node has set on the MODEL.

    `options` are the transformer_options of the current call, where such a node stores it.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, heads, L, d) -> (B, L, heads * d)."""
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, transformer_options=self.options)


class _OnHost(UViT):
    """A U-ViT on the host's operations.

    `position` and `position_token` replace the root parameters `pos_embed` and `pos_embed_token`: the host patches and
    offloads only leaf modules, and silently ignores patches on root parameters. `text_prefix` is the caption decoder's Linear
    from CLIP text to the text latent.
    """

    def __init__(self, config: UViTConfig, clip_width: int, operations: Any, device: Any = None, dtype: Any = None):
        attention = HostAttention()
        super().__init__(config, operations, attention, device=device, dtype=dtype)
        self.attention = attention
        tokens = self.pos_embed.shape[1]
        del self.pos_embed
        self.position = operations.Embedding(tokens, config.embed_dim, device=device, dtype=dtype)
        if config.data_types:
            del self.pos_embed_token
            self.position_token = operations.Embedding(1, config.embed_dim, device=device, dtype=dtype)
        self.text_prefix = operations.Linear(clip_width, config.text_dim, device=device, dtype=dtype)
        self.clip_width = clip_width
        self.in_channels = self.out_channels = config.in_chans  # read by guidance nodes
        self.named = add_unet_names(self)
        self.dtype = dtype

    def embed(self, img: Tensor, *streams: Any) -> Tensor:
        side = self.config.patch_size
        self.grid = img.shape[2] // side, img.shape[3] // side
        return super().embed(img, *streams)

    def transform(self, x: Tensor) -> Tensor:
        config, first = self.config, 2 + bool(self.config.data_types)
        text = (first, first + config.num_text_tokens)
        patches = Patches(self.attention.options, config.num_heads, self.grid, text, config.depth, self.named)
        return transform(self, x, patches) if patches else super().transform(x)

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        table = self._table(self.position)
        return table, self._table(self.position_token) if self.config.data_types else None

    @staticmethod
    def _table(embedding: torch.nn.Embedding) -> Tensor:
        # NOTE: a call, not an attribute: only then can the host move, cast and patch the weight.
        index = torch.arange(embedding.num_embeddings, device=comfy.model_management.get_torch_device())
        return embedding(index, out_dtype=torch.float32)[None]  # (1, tokens, D)


class HostUViT(_OnHost):
    """The published network."""


class HostPictureUViT(_OnHost, PictureUViT):
    """A small network with large patches."""


def host_network(config: UViTConfig, *arguments: Any, model_channels: int = 0, **named: Any) -> _OnHost:
    """The host's network for a config; `model_channels` is only read by nodes, which know it from U-Nets."""
    network = HostPictureUViT if isinstance(config, PictureUViTConfig) else HostUViT
    return network(config, *arguments, **named)


def host_keys(weights: dict[str, Tensor], prefix_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `HostUViT` from the original U-ViT keys and the "weight" and "bias" of encode_prefix."""
    renamed = {"pos_embed": "position.weight", "pos_embed_token": "position_token.weight"}
    out = {renamed.get(k, k): v[0] if k in renamed else v for k, v in weights.items()}
    return out | {f"text_prefix.{k}": v for k, v in prefix_weights.items()}
