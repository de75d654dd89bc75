"""The U-ViT of UniDiffuser: one transformer that predicts the noise of an image and of its caption, each at its own level.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (arXiv 2209.12152), in the post-norm,
two-timestep form of Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", ICML 2023
(arXiv 2303.06555). Parameter names are those of the published checkpoints.

Token order: t_img, t_text, [data type, v1 only], text (L), CLIP image (1), image patches (H/p * W/p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("img", "clip_img", "text")
CURATED = 1  # data type of the captions that v1 was fine-tuned on; 0 is web data
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
Label = Tensor | float
Predictions = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT; the defaults are the published 952 M parameter v1.

    `img_size` is the latent side, or (H, W), that `pos_embed` was trained for. `data_types` is the number of data-type
    tokens: 2 in v1, 0 (no such token) in v0.
    """

    img_size: int | tuple[int, int] = 64
    in_chans: int = 4
    patch_size: int = 2
    embed_dim: int = 1536
    depth: int = 30
    num_heads: int = 24
    text_dim: int = 64
    num_text_tokens: int = 77
    clip_img_dim: int = 512
    data_types: int = 2
    mlp_ratio: float = 4
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if any(side % self.patch_size for side in self.latent_size):
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}.")
        if self.num_heads < 1 or self.embed_dim % (2 * self.num_heads):
            raise ValueError(f"embed_dim {self.embed_dim} must be an even multiple of num_heads {self.num_heads}.")

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latent that the position embedding was trained for."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image patches at `latent_size`."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence at `latent_size`."""
        return 2 + bool(self.data_types) + self.num_text_tokens + 1 + math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        """Outputs of the image head for each patch."""
        return self.patch_size**2 * self.in_chans

    @property
    def item_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one item of each stream at the trained size: img (C, H, W), clip_img (1, D), text (L, D)."""
        others = {"clip_img": (1, self.clip_img_dim), "text": (self.num_text_tokens, self.text_dim)}
        return {"img": (self.in_chans, *self.latent_size), **others}

    def check(self, img: Tensor, clip_img: Tensor, text: Tensor, data_type: Any = None, heads: Sequence[str] = HEADS) -> None:
        """Raise ValueError for inputs that a network of these sizes cannot take."""
        p = self.patch_size
        if img.ndim != 4 or img.shape[1] != self.in_chans or any(side < p or side % p for side in img.shape[2:]):
            raise ValueError(f"img must be (B, {self.in_chans}, H, W), H and W multiples of {p}, not {tuple(img.shape)}.")
        for name, given in (("clip_img", clip_img), ("text", text)):
            if tuple(given.shape) != (wanted := (img.shape[0], *self.item_shapes[name])):
                raise ValueError(f"{name} must be {wanted} for this network and batch, not {tuple(given.shape)}.")
        if self.data_types and isinstance(data_type, int) and not 0 <= data_type < self.data_types:
            raise ValueError(f"data_type {data_type} is outside 0..{self.data_types - 1}.")
        if unknown := set(heads) - set(HEADS):
            raise ValueError(f"Unknown heads {sorted(unknown)}; there are {', '.join(HEADS)}.")


def default_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v (B, heads, L, d), returned as (B, L, heads * d), in the dtype of its inputs."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def timestep_embedding(labels: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first: labels (B,), fractional ones allowed -> (B, dim) in fp32."""
    # NOTE: keep this order of operations, the checkpoints were trained with it; at label 1000 another one is off by 1e-4.
    index = torch.arange(dim // 2, dtype=torch.float32, device=labels.device)
    args = labels.float()[:, None] * torch.exp(-math.log(max_period) * index / (dim // 2))
    return torch.cat([args.cos(), args.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool, attention: AttentionFunction, ops: Any, **factory: Any):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = ops.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = ops.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d)
        return self.proj(self.attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, ops: Any, **factory: Any):
        super().__init__()
        self.fc1 = ops.Linear(dim, hidden, **factory)
        self.fc2 = ops.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Post-norm transformer block; a block of the second half first merges the long skip from the first half."""

    def __init__(self, config: UViTConfig, skip: bool, attention: AttentionFunction, ops: Any, **factory: Any):
        super().__init__()
        dim = config.embed_dim
        if skip:
            self.skip_linear = ops.Linear(2 * dim, dim, **factory)
            self.norm1 = ops.LayerNorm(dim, **factory)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias, attention, ops, **factory)
        self.norm2 = ops.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), ops, **factory)
        self.norm3 = ops.LayerNorm(dim, **factory)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.norm1(self.skip_linear(torch.cat([x, skip], dim=-1)))
        x = self.norm2(x + self.attn(x))
        return self.norm3(x + self.mlp(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: UViTConfig, ops: Any, **factory: Any):
        super().__init__()
        self.proj = ops.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H/p * W/p, D)


class UViT(nn.Module):
    """Joint noise prediction, eps(x_tx, y_ty, tx, ty) -> (eps_x, eps_y) of arXiv 2303.06555.

    Args:
        config: the sizes.
        operations: namespace of Linear, Conv2d, LayerNorm and Embedding. Only those of `torch.nn` are initialised.
        attention: function of q, k, v (B, heads, L, d) that returns (B, L, heads * d).
        device, dtype: of the parameters; "meta" allocates none, for load_state_dict(assign=True).
    """

    def __init__(
        self, config: UViTConfig, operations: Any = nn, attention: AttentionFunction = default_attention,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        dim, half, ops, factory = config.embed_dim, config.depth // 2, operations, dict[str, Any](device=device, dtype=dtype)
        self.patch_embed = PatchEmbed(config, ops, **factory)
        self.text_embed = ops.Linear(config.text_dim, dim, **factory)
        self.clip_img_embed = ops.Linear(config.clip_img_dim, dim, **factory)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens - bool(config.data_types), dim, **factory))
        if config.data_types:
            self.token_embedding = ops.Embedding(config.data_types, dim, **factory)
            self.pos_embed_token = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.in_blocks = nn.ModuleList([Block(config, False, attention, ops, **factory) for _ in range(half)])
        self.mid_block = Block(config, False, attention, ops, **factory)
        self.out_blocks = nn.ModuleList([Block(config, True, attention, ops, **factory) for _ in range(half)])
        self.norm = ops.LayerNorm(dim, **factory)
        self.decoder_pred = ops.Linear(dim, config.patch_values, **factory)
        self.clip_img_out = ops.Linear(dim, config.clip_img_dim, **factory)
        self.text_out = ops.Linear(dim, config.text_dim, **factory)
        if operations is nn:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            self.apply(initialise_linear)

    def forward(
        self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Label, t_text: Label,
        data_type: Tensor | int | None = None, heads: Sequence[str] = HEADS,
    ) -> Predictions:  # fmt: skip
        """Noise predictions for (img, clip_img, text), each in its input's shape; None for a head not in `heads`.

        Args:
            img: (B, C, H, W) noisy image latent; H and W multiples of the patch, not necessarily equal.
            clip_img: (B, 1, clip_img_dim) noisy CLIP image token, at the image's noise level.
            text: (B, num_text_tokens, text_dim) noisy text latent.
            t_img, t_text: (B,) or one number for all: labels 0 (clean) .. 1000 (pure noise), fractions allowed.
            data_type: (B,) or one number, below `data_types`; None means curated data. Ignored by v0.
            heads: which of "img", "clip_img", "text" to compute.

        Raises:
            ValueError: a shape, data type or head that this network cannot take.
        """
        self.config.check(img, clip_img, text, data_type, heads)
        x = self.transform(self.embed(img, clip_img, text, t_img, t_text, data_type))
        return self.read(x, img, t_img, heads)

    def embed(
        self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Label, t_text: Label, data_type: Tensor | int | None = None
    ) -> Tensor:
        """Streams and labels as in `forward` -> tokens (B, N, D) with their positions."""
        kind = min(CURATED, self.config.data_types - 1) if data_type is None else data_type
        t_img, t_text, kind = (torch.as_tensor(x, device=img.device).expand(len(img)) for x in (t_img, t_text, kind))
        tokens = [timestep_embedding(t, self.config.embed_dim).to(img.dtype)[:, None] for t in (t_img, t_text)]
        if self.config.data_types:
            tokens.append(self.token_embedding(kind.long()).to(img.dtype)[:, None])
        tokens += [self.text_embed(text), self.clip_img_embed(clip_img), self.patch_embed(img)]
        x = torch.cat(tokens, dim=1)
        p = self.config.patch_size
        return x + self.position_embedding((img.shape[2] // p, img.shape[3] // p)).to(x.dtype)

    def transform(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) through the U: first half, middle, second half with the long skips."""
        skips = []
        for block in self.in_blocks:
            skips.append(x := block(x))
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return x

    def read(self, x: Tensor, img: Tensor, t_img: Label, heads: Sequence[str] = HEADS) -> Predictions:
        """Tokens (B, N, D) -> the noise of each stream in `heads`; `img` and `t_img` are the inputs they were made from."""
        sizes = [self.config.num_text_tokens, 1, img.shape[2] * img.shape[3] // self.config.patch_size**2]
        times, text, clip_img, patches = torch.split(x, [x.shape[1] - sum(sizes), *sizes], dim=1)
        return (
            self.image(self.decoder_pred(self.norm(patches)), times, img, t_img) if "img" in heads else None,
            self.clip_img_out(self.norm(clip_img)) if "clip_img" in heads else None,
            self.text_out(self.norm(text)) if "text" in heads else None,
        )

    def image(self, patches: Tensor, times: Tensor, img: Tensor, t_img: Label) -> Tensor:
        """Image noise from the head's output (B, patches, p * p * C); subclasses may refine it with the other arguments."""
        return unpatchify(patches, self.config.patch_size, img.shape[2:])

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        """`pos_embed` (1, N without data type, D) and `pos_embed_token` (1, 1, D; None in v0), wherever a subclass has them."""
        return self.pos_embed, self.pos_embed_token if self.config.data_types else None

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """(1, N, D) for (rows, columns) of patches; bilinear resampling of the image part, as the authors do for squares."""
        table, token = self.position_tables()
        times, others, patches = torch.split(table, [2, self.config.num_text_tokens + 1, math.prod(self.config.grid)], dim=1)
        if grid != self.config.grid:
            image = patches.transpose(1, 2).unflatten(2, self.config.grid)  # (1, D, rows, columns)
            image = F.interpolate(image.float(), grid, mode="bilinear")  # fp32: half has no bilinear on every device
            patches = image.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([times, *([] if token is None else [token]), others, patches], dim=1)


def initialise_linear(module: nn.Module) -> None:
    """The authors' initialisation of Linear layers; others keep torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def unpatchify(x: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """(B, patches, side * side * C) -> (B, C, H, W), `size` (H, W)."""
    x = x.reshape(x.shape[0], size[0] // side, size[1] // side, side, side, -1)  # (B, rows, columns, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
