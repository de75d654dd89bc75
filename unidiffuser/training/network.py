"""The U-ViT in training: attention, cost of an example, sample grid and exported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, save_checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.skeleton import assign_weights, skeleton
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import TextEncoder
from ..media.images import to_images
from ..path import NoisePath
from ..samplers import sample
from ..small.network import build
from ..streams import Streams, item_generators
from ..uvit import AttentionFunction, UViT, UViTConfig, default_attention
from .stage import ExampleCost

SHORT = 128  # tokens up to which unfused attention is faster on a CPU


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unfused attention, (B, heads, L, d) -> (B, L, heads * d).

    For a few dozen tokens on a CPU, where the backward pass of the fused kernel takes longer than all matrix products together.
    """
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (weights.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def attention_for(sizes: UViTConfig) -> AttentionFunction:
    """The faster attention on this machine for a network of these sizes."""
    return short_attention if sizes.tokens <= SHORT and not torch.cuda.is_available() else default_attention


def trainable_network(sizes: UViTConfig, weights: Mapping[str, Tensor]) -> UViT:
    """A network with these weights (float32, original names) and the attention that trains fastest on this machine."""
    with skeleton():
        network = build(sizes, attention=attention_for(sizes))
    assign_weights(network, weights, "the given network")
    return network


def prompt_grid(model: UViT, prompts: Sequence[str], encode_text: TextEncoder, autoencoder: Autoencoder) -> Image.Image:
    """Pictures of the prompts, 8 in a row, 20 steps at guidance 3."""
    text = encode_text(prompts).float().to(model.pos_embed.device)
    generators = item_generators(0, len(prompts))
    out = sample(model, NoisePath.text_to_image(20), Streams(text=text), guidance=3.0, generator=generators)
    pixels = autoencoder.decode(out.need("img")).cpu()
    pixels = torch.cat([pixels, torch.ones_like(pixels[: -len(pixels) % 8])])
    grid = torch.cat([torch.cat(list(row), dim=2) for row in pixels.split(8)], dim=1)
    return to_images(grid[None])[0]


def export_model(
    checkpoint: Checkpoint,
    network: UViT,
    path: Path,
    dtype: torch.dtype | None,
    defaults: dict[str, float],
    changed: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the parts of a checkpoint, with another network, as one file; parts that it lacks stay absent.

    Args:
        checkpoint: where the other parts come from.
        network: the network.
        path: the file.
        dtype: of all weights; None keeps each.
        defaults: sampling options that the file suggests.
        changed: weights of parts that have changed, by part; of the network too, if they are not to be taken as they are.
    """
    sections = checkpoint.config.to_dict() | {"defaults": dict(defaults)}
    side = network.config.latent_size[0] * checkpoint.config.vae.downscale
    config = ModelConfig.from_dict(sections | {"uvit": vars(network.config), "image_size": side})
    parts = {name: checkpoint.state_dict(name) for name in checkpoint.parts() if name != "uvit"}
    parts |= {"uvit": network.state_dict(), **{name: dict(weights) for name, weights in (changed or {}).items()}}
    save_checkpoint(path, config, parts, checkpoint.tokenizer_specs(), dtype)


def example_cost(sizes: UViTConfig) -> ExampleCost:
    """Tokens and operations of an example: three times a forward pass, counted by torch on a network without data."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build(sizes, device="meta", attention=_plain_attention)
    shapes = sizes.item_shapes
    streams = [torch.empty(1, *shapes[name], device="meta") for name in ("img", "clip_img", "text")]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(*streams, torch.ones(1, device="meta"), torch.ones(1, device="meta"))
    return ExampleCost(sizes.tokens, 3.0 * counter.get_total_flops())


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as two matrix products, which torch's counter knows on every device."""
    return (q @ k.transpose(-2, -1) @ v).transpose(1, 2).flatten(2)
