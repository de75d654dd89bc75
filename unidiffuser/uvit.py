"""The network: a U-ViT that predicts the noise of an image and of its caption, each at its own noise level.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (arXiv 2209.12152), in the post-norm,
two-timestep form of Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", ICML 2023
(arXiv 2303.06555). Parameter names are those of the published checkpoints, so their state dicts load as they are.

Tokens, in order: t_img, t_text, [data type], text (L), CLIP image (1), image patches (H/p * W/p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .small.detail import FOLD, DetailHead, noise_of_output

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
Inner = Callable[[int, int, Callable[[], Tensor]], Tensor]
HEADS = ("img", "clip_img", "text")
CURATED = 1  # data type of the cleaner captions that v1 was continued on; 0 is web data


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT; the defaults are those of the published 952 M parameter v1.

    `img_size` is the latent side (or (H, W)) that `pos_embed` was trained for. `data_types` is the number of data-type
    tokens the network knows: 2 in v1, 0 (no such token at all) in v0.

    Published networks predict the noise of an image from patches alone. `sigma_data` lets the image head predict something
    between noise and picture instead, see :func:`.detail.noise_of_output`; what the network returns is the noise all the same.
    `detail_width` above 0 adds a :class:`.detail.DetailHead` of that width, of `detail_blocks` blocks, which is told
    `detail_features` features of the patches; `detail_inner` above 0 gives it an inner level of that width, of
    `detail_inner_blocks` blocks, and with `detail_told` above 0 its blocks are told so many numbers of the image's time token.
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
    sigma_data: float | None = None
    detail_width: int = 0
    detail_blocks: int = 2
    detail_features: int = 24
    detail_inner: int = 0
    detail_inner_blocks: int = 4
    detail_told: int = 0

    def __post_init__(self) -> None:
        h, w = self.latent_size
        if self.sigma_data is not None and not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be above 0, or None for a network that predicts noise, not {self.sigma_data}.")
        fold = FOLD**2 if self.detail_inner else FOLD
        if self.detail_width and self.patch_size % fold:
            raise ValueError(f"patch_size {self.patch_size} must be a multiple of {fold} for this detail head.")
        if not self.detail_width and (self.detail_inner or self.detail_told):
            raise ValueError("detail_inner and detail_told are of a detail head; give it a detail_width.")
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}.")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(f"embed_dim {self.embed_dim} must be an even multiple of num_heads {self.num_heads}.")

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latent that the position embedding was trained for."""
        height, width = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image patches at `latent_size`."""
        h, w = self.latent_size
        return h // self.patch_size, w // self.patch_size

    @property
    def patch_outputs(self) -> tuple[int, int]:
        """(side, channels) of the square that each image patch is turned into."""
        if not self.detail_width:
            return self.patch_size, self.in_chans
        return self.patch_size // FOLD, FOLD**2 * self.in_chans + self.detail_features

    @property
    def item_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one item of each stream at the trained size: img (C, H, W), clip_img (1, D), text (L, D)."""
        return {
            "img": (self.in_chans, *self.latent_size),
            "clip_img": (1, self.clip_img_dim),
            "text": (self.num_text_tokens, self.text_dim),
        }


def default_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v (B, heads, L, d), returned as (B, L, heads * d), in the dtype of its inputs."""
    x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)  # (B, heads, L, d) -> (B, L, heads * d)


def timestep_embedding(labels: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first: labels (B,), fractional ones allowed -> (B, dim) in fp32."""
    half = dim // 2
    # NOTE: this order of operations is that of the checkpoints' training; at label 1000 another one is off by 1e-4.
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=labels.device) / half)
    args = labels.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool, attention: AttentionFunction, ops: Any, **factory: Any):
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.qkv = ops.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = ops.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d) each, views only
        out: Tensor = self.proj(self.attention(q, k, v))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, ops: Any, **factory: Any):
        super().__init__()
        self.fc1 = ops.Linear(dim, hidden, **factory)
        self.fc2 = ops.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Post-norm transformer block; one in the second half of the U first merges the skip from the first half."""

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
        out: Tensor = self.norm3(x + self.mlp(x))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, config: UViTConfig, ops: Any, **factory: Any):
        super().__init__()
        p = config.patch_size
        self.proj = ops.Conv2d(config.in_chans, config.embed_dim, kernel_size=p, stride=p, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H/p * W/p, D)


def _in_batches(size: int, layer: nn.Module, *given: Tensor) -> Tensor:
    """A layer of tensors with the batch in front, `size` items at a time."""
    if size >= len(given[0]):
        out: Tensor = layer(*given)
        return out
    return torch.cat([layer(*part) for part in zip(*(x.split(size) for x in given), strict=True)])


def _filled(x: Any, size: int) -> Any:
    """A batch filled up with copies of its last item to a multiple of `size`; what is one for all stays as it is."""
    missing = -len(x) % size if isinstance(x, Tensor) and x.ndim else 0
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


class UViT(nn.Module):
    """Joint noise prediction, eps(x_tx, y_ty, tx, ty) -> (eps_x, eps_y) of arXiv 2303.06555.

    Args:
        config: the sizes.
        operations: where Linear, Conv2d, LayerNorm and Embedding come from: `torch.nn`, or a host's namespace of the
            same names. Weights are initialised for training only with `torch.nn`; a host loads them.
        attention: function of q, k, v (B, heads, L, d) that returns (B, L, heads * d).
        device, dtype: where the parameters are made; "meta" makes none, for load_state_dict(assign=True).

    Attributes:
        rows: None, or at how many tokens at least every layer works at a time: then always as many items as that takes, the
            last ones filled up with copies, so that no item depends on the batch it is in (see `precision`). Each block
            goes through all of a batch before the next, which keeps its weights in the cache.
    """

    rows: int | None = None

    def __init__(
        self,
        config: UViTConfig,
        operations: Any = nn,
        attention: AttentionFunction = default_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, ops = config.embed_dim, operations

        self.patch_embed = PatchEmbed(config, ops, **factory)
        self.text_embed = ops.Linear(config.text_dim, dim, **factory)
        self.clip_img_embed = ops.Linear(config.clip_img_dim, dim, **factory)
        tokens = 2 + config.num_text_tokens + 1 + math.prod(config.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim, **factory))
        if config.data_types:
            self.token_embedding = ops.Embedding(config.data_types, dim, **factory)
            self.pos_embed_token = nn.Parameter(torch.zeros(1, 1, dim, **factory))

        half = config.depth // 2
        self.in_blocks = nn.ModuleList([Block(config, False, attention, ops, **factory) for _ in range(half)])
        self.mid_block = Block(config, False, attention, ops, **factory)
        self.out_blocks = nn.ModuleList([Block(config, True, attention, ops, **factory) for _ in range(half)])

        self.norm = ops.LayerNorm(dim, **factory)
        side, channels = config.patch_outputs
        self.decoder_pred = ops.Linear(dim, side**2 * channels, **factory)
        if config.detail_width:
            sizes = config.in_chans, config.detail_features, config.detail_width, config.detail_blocks
            self.detail = DetailHead(
                *sizes, ops, inner=config.detail_inner, inner_blocks=config.detail_inner_blocks,
                token=dim, told=config.detail_told, **factory,
            )  # fmt: skip
        self.clip_img_out = ops.Linear(dim, config.clip_img_dim, **factory)
        self.text_out = ops.Linear(dim, config.text_dim, **factory)
        if operations is nn:
            self._initialise()

    def _initialise(self) -> None:
        """As the authors: truncated normal of 0.02 for Linear and pos_embed, torch's own defaults elsewhere."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.detail_width:
            self.detail.begin_with_the_draft()

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        """`pos_embed` (1, 2 + L + 1 + patches, D) and `pos_embed_token` (1, 1, D; None in v0).

        A host that can only patch or offload leaf modules keeps them in one and overrides this.
        """
        return self.pos_embed, self.pos_embed_token if self.config.data_types else None

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, tokens, D) for a grid of (rows, columns) patches.

        The image part is resampled bilinearly when the grid is not the trained one, as the authors do for squares.
        """
        table, token = self.position_tables()
        sizes = [2, self.config.num_text_tokens + 1, math.prod(self.config.grid)]
        times, others, patches = torch.split(table, sizes, dim=1)
        if grid != self.config.grid:
            image = patches.transpose(1, 2).unflatten(2, self.config.grid)  # (1, D, rows, columns)
            image = F.interpolate(image.float(), grid, mode="bilinear")  # fp32: half has no bilinear on every device
            patches = image.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([times, *([] if token is None else [token]), others, patches], dim=1)

    def forward(
        self,
        img: Tensor,
        clip_img: Tensor,
        text: Tensor,
        t_img: Tensor | float,
        t_text: Tensor | float,
        data_type: Tensor | int | None = None,
        heads: Sequence[str] = HEADS,
        inner: Inner | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Noise predictions for (img, clip_img, text), each in its input's shape; None for a head not in `heads`.

        Args:
            img: (B, C, H, W) noisy image latent; H and W multiples of the patch, not necessarily equal.
            clip_img: (B, 1, clip_img_dim) noisy CLIP image token, at the image's noise level.
            text: (B, num_text_tokens, text_dim) noisy text latent.
            t_img, t_text: (B,) or one number for all: labels 0 (clean) .. 1000 (pure noise), fractions allowed.
            data_type: (B,) or one number, below `data_types`; None means curated data. Ignored by v0.
            heads: which of "img", "clip_img", "text" to compute.
            inner: called at each level of the U, from 0 outside, with the level, the number of items and a function that
                computes what lies inside it; returns that, (items, tokens, D), or a stand-in. None computes all.

        Raises:
            ValueError: a shape, data type or head that this network cannot take.
        """
        self._check(img, clip_img, text, heads)
        grid = img.shape[2] // self.config.patch_size, img.shape[3] // self.config.patch_size

        batch, position = img.shape[0], self.position_embedding(grid)
        size = batch if self.rows is None else math.ceil(self.rows / position.shape[1])
        img, clip_img, text = (_filled(x, size) for x in (img, clip_img, text))
        t_img, t_text, data_type = (_filled(x, size) for x in (t_img, t_text, data_type))

        tokens = [self._time_token(t_img, img), self._time_token(t_text, img)]
        if self.config.data_types:
            tokens.append(self._data_token(data_type, img))
        given = (self.text_embed, text), (self.clip_img_embed, clip_img), (self.patch_embed, img)
        tokens += [_in_batches(size, embed, x) for embed, x in given]
        x = torch.cat(tokens, dim=1)  # (B, tokens, D)
        x = x + position.to(x.dtype)

        x = self._through_the_u(x, 0, size, inner)

        sizes = [self.config.num_text_tokens, 1, math.prod(grid)]
        others, text_x, clip_x, img_x = torch.split(x, [x.shape[1] - sum(sizes), *sizes], dim=1)

        def head(layer: nn.Module, x: Tensor) -> Tensor:
            return _in_batches(size, layer, self.norm(x))

        def image() -> Tensor:
            return self._image(head(self.decoder_pred, img_x), others[:, 0], grid, img, t_img, size)

        return (
            image()[:batch] if "img" in heads else None,
            head(self.clip_img_out, clip_x)[:batch] if "clip_img" in heads else None,
            head(self.text_out, text_x)[:batch] if "text" in heads else None,
        )

    def _image(
        self, patches: Tensor, time: Tensor, grid: tuple[int, int], img: Tensor, t_img: Tensor | float, size: int
    ) -> Tensor:
        """The noise of an image, from what its patches (B, patches, channels * side^2) and its time token (B, D) say."""
        x = self._unpatchify(patches, grid)
        if self.config.detail_width:
            x = _in_batches(size, self.detail, img, x, self.norm(time))
        if self.config.sigma_data is None:
            return x
        return noise_of_output(x, img, self._of_each(t_img, img), self.config.sigma_data)

    def _through_the_u(self, x: Tensor, level: int, size: int, inner: Inner | None) -> Tensor:
        """One level of the U: its first block, all levels inside, and its last block with the long skip from the first."""
        if level == len(self.in_blocks):
            return _in_batches(size, self.mid_block, x)
        skip = _in_batches(size, self.in_blocks[level], x)

        def inside() -> Tensor:
            return self._through_the_u(skip, level + 1, size, inner)

        x = inside() if inner is None else inner(level, len(skip), inside)
        return _in_batches(size, self.out_blocks[-1 - level], x, skip)

    @staticmethod
    def _of_each(told: Tensor | float, img: Tensor) -> Tensor:
        """(B,) of what was told of each item, or as one number for all."""
        return torch.as_tensor(told, device=img.device).expand(img.shape[0])

    def _time_token(self, label: Tensor | float, img: Tensor) -> Tensor:
        return timestep_embedding(self._of_each(label, img), self.config.embed_dim).to(img.dtype)[:, None]  # (B, 1, D)

    def _data_token(self, data_type: Tensor | int | None, img: Tensor) -> Tensor:
        if data_type is None:
            data_type = min(CURATED, self.config.data_types - 1)
        if isinstance(data_type, int) and not 0 <= data_type < self.config.data_types:
            raise ValueError(f"data_type {data_type} is outside 0..{self.config.data_types - 1}.")
        token: Tensor = self.token_embedding(self._of_each(data_type, img).long())
        return token.to(img.dtype)[:, None]  # (B, 1, D)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p, c = self.config.patch_outputs
        x = x.reshape(x.shape[0], *grid, p, p, c)  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], c, grid[0] * p, grid[1] * p)

    def _check(self, img: Tensor, clip_img: Tensor, text: Tensor, heads: Sequence[str]) -> None:
        c = self.config
        p = c.patch_size
        if img.ndim != 4 or img.shape[1] != c.in_chans or any(side < p or side % p for side in img.shape[2:]):
            raise ValueError(f"img must be (B, {c.in_chans}, H, W), H and W multiples of {p}, not {tuple(img.shape)}.")
        batch = img.shape[0]
        for name, given, wanted in (
            ("clip_img", clip_img, (batch, 1, c.clip_img_dim)),
            ("text", text, (batch, c.num_text_tokens, c.text_dim)),
        ):
            if tuple(given.shape) != wanted:
                raise ValueError(f"{name} must be {wanted} for this network and batch, not {tuple(given.shape)}.")
        unknown = set(heads) - set(HEADS)
        if unknown:
            raise ValueError(f"Unknown heads {sorted(unknown)}; there are {', '.join(HEADS)}.")
