"""Packs the streams of a sample into one tensor (B, 1, N), since the host's samplers take one tensor.

In a plain KSampler the pack holds the image latent and the CLIP image token, which the network denoises together. A wrapper
adds the token before sampling and removes it afterwards, so LATENT stays the host's plain four channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..unidiffuser.streams import draw_noise, item_generators
from ..unidiffuser.uvit import UViTConfig
from .memory_errors import say_what_to_do

LARGEST = 3  # largest area of a latent, in multiples of the trained one
WRAPPER_KEY = "unidiffuser"  # key of the wrapper, and of the SampledStreams in transformer_options
Shape = tuple[int, ...]


def pack(streams: Sequence[Tensor]) -> Tensor:
    """Streams (B, ...) -> (B, 1, N)."""
    return torch.cat([s.reshape(s.shape[0], 1, -1) for s in streams], dim=-1)


def unpack(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """(B, 1, N) -> streams (B, *shape). B is the pack's own: the host stacks conditions along it."""
    parts = packed.split([math.prod(s) for s in shapes], dim=-1)
    return [p.reshape(packed.shape[0], *s) for p, s in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Request:
    """A call of the network by the UniDiffuser Sampler: its arguments beside the three streams."""

    t_img: Tensor
    t_text: Tensor
    data_type: Tensor
    heads: Sequence[str]


@dataclass(frozen=True)
class SampledStreams:
    """Describes the packed tensor to the model, in transformer_options.

    Attributes:
        shapes: of the packed streams, without the batch.
        generators: one per batch item, for the noise that replaces a missing text.
        request: set by the UniDiffuser Sampler: the pack then holds all three streams, variance-preserving, and the model
            returns noise predictions. None for a host sampler, which calls the model at a sigma.
    """

    shapes: list[Shape]
    generators: list[torch.Generator] = field(default_factory=list)
    request: Request | None = None

    def text_noise(self, shape: Shape) -> Tensor:
        """Fresh noise (B, *shape) on the CPU."""
        return draw_noise(shape, self.generators, "cpu")


def sample_with_clip_stream(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Callable[..., None] | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """OUTER_SAMPLE wrapper that adds the CLIP image token to a plain image latent and removes it afterwards.

    A CLIP_VISION_OUTPUT in the positive conditioning (core unCLIPConditioning) is held as the token; without
    one the token is generated with the image.
    """
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    if WRAPPER_KEY in options:  # the UniDiffuser Sampler packs its own streams
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)

    model = guider.model_patcher.model
    net = model.diffusion_model.config
    check_image_latent(latent_image, net, model.latent_format.spacial_downscale_ratio)
    batch, image_shape, clip_shape = latent_image.shape[0], tuple(latent_image.shape[1:]), (1, net.clip_img_dim)
    shapes = [image_shape, clip_shape]
    generators = item_generators(seed or 0, batch)
    draw_noise(image_shape, generators, "cpu")  # the library draws an item's image noise first; the host has drawn its own
    clip_noise = draw_noise(clip_shape, generators, "cpu")

    token = clip_token(guider.conds.get("positive", []), batch, net.clip_img_dim)
    clip_latent = torch.zeros(batch, *clip_shape) if token is None else token
    if denoise_mask is not None or token is not None:
        mask = torch.ones(batch, *image_shape) if denoise_mask is None else denoise_mask.expand(batch, *image_shape).cpu()
        clip_mask = torch.ones(batch, *clip_shape) if token is None else torch.zeros(batch, *clip_shape)
        denoise_mask = pack([mask, clip_mask]).to(guider.model_patcher.load_device)

    packed = pack([model.process_latent_in(latent_image).cpu(), clip_latent])
    packed_noise = pack([noise.cpu(), clip_noise])
    options[WRAPPER_KEY] = SampledStreams(shapes, generators)
    if "latent_shapes" in kwargs:
        kwargs["latent_shapes"] = [packed.shape]
    try:
        with say_what_to_do():
            show = image_callback(callback, shapes)
            out = executor(packed_noise, packed, sampler, sigmas, denoise_mask, show, disable_pbar, seed, **kwargs)
    finally:
        del options[WRAPPER_KEY]
    return model.process_latent_out(unpack(out, shapes)[0])


def image_callback(callback: Callable[..., None] | None, shapes: Sequence[Shape]) -> Callable[..., None] | None:
    """A host callback (step, x0, x, total) that receives only the image of the pack, for previews."""
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step, unpack(x0, shapes)[0], unpack(x, shapes)[0], total)


def check_image_latent(latent: Tensor, config: UViTConfig, downscale: int) -> None:
    """Check that a LATENT fits the network.

    `downscale` is the number of pixels per latent cell, along a side.

    Raises:
        ValueError: it has the wrong channels, is too large, or its sides are not multiples of the patch size.
    """
    patch, (rows, columns) = config.patch_size, config.latent_size
    if latent.ndim != 4 or latent.shape[1] != config.in_chans:
        raise ValueError(
            f"The LATENT is {tuple(latent.shape)}, but UniDiffuser needs {config.in_chans} channels, as Stable Diffusion 1.x. "
            f"Use 'Empty Latent Image', or VAE Encode with the VAE output of 'Load UniDiffuser'."
        )
    height, width = latent.shape[2:]
    if height * width > LARGEST * rows * columns:
        raise ValueError(
            f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model was trained on "
            f"{columns * downscale} x {rows * downscale} and fails above {LARGEST} times that area. Use a "
            f"smaller 'Empty Latent Image', or scale the image down before VAE Encode."
        )
    if height % patch or width % patch:
        raise ValueError(
            f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model needs sides that are "
            f"multiples of {patch * downscale} pixels."
        )


def clip_token(conditioning: Sequence[dict[str, Any]], batch: int, width: int) -> Tensor | None:
    """The CLIP image token (B, 1, width) of a conditioning, or None if it has none.

    Raises:
        ValueError: the token is of another CLIP vision model.
    """
    for cond in conditioning:
        for entry in cond.get("unclip_conditioning", []):
            return clip_vision_token(entry["clip_vision_output"], batch, width)
    return None


def clip_vision_token(output: Any, batch: int, width: int) -> Tensor:
    """The CLIP image token (B, 1, width) of a CLIP_VISION_OUTPUT, repeated over the batch.

    Raises:
        ValueError: the token is of another CLIP vision model.
    """
    embeds = output["image_embeds"]
    if embeds.shape[-1] != width:
        raise ValueError(
            f"The CLIP_VISION_OUTPUT has {embeds.shape[-1]} channels, but this model needs {width}. Use CLIP Vision Encode "
            f"with the CLIP_VISION output of 'Load UniDiffuser'."
        )
    token = embeds.float().cpu().reshape(-1, 1, width)
    return token.repeat(-(-batch // token.shape[0]), 1, 1)[:batch]
