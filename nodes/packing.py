"""How the streams of a sample travel through the host's samplers, which know one tensor: as a flat pack (B, 1, N).

The plain KSampler path packs the image latent with the CLIP image token, which the network denoises beside it. The token is
added and taken away again around the sampling, so that LATENT stays the host's plain four channels.
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

LARGEST = 3  # area of a latent, in that of the trained one
WRAPPER_KEY = "unidiffuser"  # of the wrapper, and in transformer_options of the SampledStreams
Shape = tuple[int, ...]


def pack(streams: Sequence[Tensor]) -> Tensor:
    """Streams (B, ...) -> (B, 1, N)."""
    return torch.cat([s.reshape(s.shape[0], 1, -1) for s in streams], dim=-1)


def unpack(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """(B, 1, N) -> streams (B, *shape), the batch being the pack's own (the host stacks conditions along it)."""
    parts = packed.split([math.prod(s) for s in shapes], dim=-1)
    return [p.reshape(packed.shape[0], *s) for p, s in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Request:
    """What the UniDiffuser Sampler asks the model: the network's own arguments beside the three streams."""

    t_img: Tensor
    t_text: Tensor
    data_type: Tensor
    heads: Sequence[str]


@dataclass(frozen=True)
class SampledStreams:
    """What is being sampled, for the model: handed to it in transformer_options.

    `shapes` are the packed streams without their batch. `generators`, one per item, make the noise that stands in for a
    missing text. With a `request` the pack is all three streams, variance-preserving, and noise predictions are wanted;
    without one a sampler of the host asks at a sigma.
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
    """OUTER_SAMPLE wrapper: adds the CLIP image token to a plain image latent and takes it away again.

    A CLIP_VISION_OUTPUT in the positive conditioning (core unCLIPConditioning) is kept as the token throughout; otherwise
    the token is generated with the picture.
    """
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    if WRAPPER_KEY in options:  # the UniDiffuser Sampler has packed its streams itself
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)

    model = guider.model_patcher.model
    net = model.diffusion_model.config
    check_image_latent(latent_image, net, model.latent_format.spacial_downscale_ratio)
    batch, image_shape, clip_shape = latent_image.shape[0], tuple(latent_image.shape[1:]), (1, net.clip_img_dim)
    shapes = [image_shape, clip_shape]
    generators = item_generators(seed or 0, batch)
    draw_noise(image_shape, generators, "cpu")  # the library draws an item's image first; here the host has drawn it
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
    """A host callback (step, x0, x, total) that is shown only the image of a pack; previews draw it."""
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step, unpack(x0, shapes)[0], unpack(x, shapes)[0], total)


def check_image_latent(latent: Tensor, config: UViTConfig, downscale: int) -> None:
    """Raise ValueError, in the artist's words, for a LATENT that the network cannot take or makes nothing of.

    `downscale`: pixels along a side, for one of the latent.
    """
    patch, (rows, columns) = config.patch_size, config.latent_size
    if latent.ndim != 4 or latent.shape[1] != config.in_chans:
        raise ValueError(
            f"The LATENT is {tuple(latent.shape)}, but UniDiffuser works on {config.in_chans} channels (Stable Diffusion "
            f"1.x). Use 'Empty Latent Image', or VAE Encode with the VAE output of 'Load UniDiffuser'."
        )
    height, width = latent.shape[2:]
    if height * width > LARGEST * rows * columns:
        raise ValueError(
            f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model was trained on "
            f"{columns * downscale} x {rows * downscale} and makes nothing sensible of more than {LARGEST} times that area. "
            f"Choose a smaller 'Empty Latent Image', or scale the picture down before VAE Encode."
        )
    if height % patch or width % patch:
        raise ValueError(
            f"The LATENT is {width} x {height}; this model needs sides that are multiples of {patch}, so a picture whose "
            f"sides are multiples of {patch * downscale} pixels."
        )


def clip_token(conditioning: Sequence[dict[str, Any]], batch: int, width: int) -> Tensor | None:
    """The CLIP image token (B, 1, width) that a conditioning carries, or None.

    Raises:
        ValueError: it comes from another CLIP vision model.
    """
    for cond in conditioning:
        for entry in cond.get("unclip_conditioning", []):
            return clip_vision_token(entry["clip_vision_output"], batch, width)
    return None


def clip_vision_token(output: Any, batch: int, width: int) -> Tensor:
    """The token (B, 1, width) of a CLIP_VISION_OUTPUT, repeated over the batch.

    Raises:
        ValueError: it comes from another CLIP vision model.
    """
    embeds = output["image_embeds"]
    if embeds.shape[-1] != width:
        raise ValueError(
            f"The CLIP_VISION_OUTPUT has {embeds.shape[-1]} numbers, this model needs {width}. Encode the "
            f"picture with the CLIP_VISION output of 'Load UniDiffuser'."
        )
    token = embeds.float().cpu().reshape(-1, 1, width)
    return token.repeat(-(-batch // token.shape[0]), 1, 1)[:batch]
