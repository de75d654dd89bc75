"""Pictures and words to latents and back, without a host: CLIP's two towers and the KL autoencoder.

Each class holds a module of transformers or diffusers built straight on a checkpoint's weights, and does the small things
around it that the published model was trained with. Latents are those of arXiv 2303.06555, section 4: a sample of the
autoencoder's posterior times its scale factor, CLIP's projected image embedding as it is, and CLIP's last text states
through the caption decoder's first Linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, VAEConfig
from ..checkpoints.keys import Recipe, Recipes, vae_to_diffusers
from ..checkpoints.skeleton import skeleton
from ..checkpoints.tokenizers import BytePairTokenizer
from ..runtime.precision import ROWS, depends_on_batch, in_fixed_batches
from ..small.palette import Palette
from ..small.stem import ConvStem, Norm, no_norm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

Device = torch.device | str | None


def clip_text_model(config: dict[str, Any]) -> CLIPTextModel:
    """The text tower that `ModelConfig.clip_text` describes, with fresh weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def clip_image_model(config: dict[str, Any], norm: Norm = no_norm) -> CLIPVisionModelWithProjection:
    """The image tower that `ModelConfig.clip_image` describes, with fresh weights; `norm` is for training a `ConvStem`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    fields = {name: value for name, value in config.items() if name not in ("image_mean", "image_std", "stem")}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))
    if "stem" in config:
        tower.vision_model.embeddings.patch_embedding = ConvStem(**config["stem"], norm=norm)
    return tower


def autoencoder_kl(config: VAEConfig, sample_size: int = 512) -> AutoencoderKL:
    """The autoencoder that `ModelConfig.vae` describes, with fresh weights; `sample_size` is the side of a tile."""
    from diffusers import AutoencoderKL

    dd = config.ddconfig
    vae = AutoencoderKL(
        in_channels=dd["in_channels"],
        out_channels=dd["out_ch"],
        down_block_types=("DownEncoderBlock2D",) * len(dd["ch_mult"]),
        up_block_types=("UpDecoderBlock2D",) * len(dd["ch_mult"]),
        block_out_channels=tuple(dd["ch"] * m for m in dd["ch_mult"]),
        layers_per_block=dd["num_res_blocks"],
        latent_channels=dd["z_channels"],
        sample_size=sample_size,
    )
    if config.palette:
        vae.palette = Palette(len(config.palette["manners"]), config.palette["colours"])
    return vae


class TextEncoder:
    """Prompts to text latents.

    Args:
        clip: the text tower.
        encode_prefix: the Linear layer from CLIP's width to text_dim.
        tokenizer: its byte pairs.
        length: number of tokens L.
    """

    def __init__(self, clip: CLIPTextModel, encode_prefix: nn.Module, tokenizer: BytePairTokenizer, length: int):
        self.clip, self.encode_prefix, self.tokenizer, self.length = clip, encode_prefix, tokenizer, length

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Needs "clip_text" and the first layer of "caption"."""
        config = checkpoint.config
        with skeleton():
            clip = clip_text_model(config.clip_text)
            linear = nn.Linear(config.caption.prefix_dim, config.caption.hidden_dim)
        prefixed = any(name.startswith("text_model.") for name in clip.state_dict())
        rename = None if prefixed else _without_text_model
        checkpoint.load_into(clip, "clip_text", rename=rename, device=device, dtype=dtype)
        checkpoint.load_into(linear, "caption", prefix="encode_prefix.", device=device, dtype=dtype)
        return cls(clip, linear, checkpoint.clip_tokenizer(), config.uvit.num_text_tokens)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts (B of them; "" is the empty caption) -> text latents (B, L, text_dim). Long ones are cut with a warning."""
        return self.compress(self.hidden(texts))

    @torch.inference_mode()
    def hidden(self, texts: Sequence[str]) -> Tensor:
        """CLIP's last hidden state, after its final layer norm: (B, L, width)."""
        if isinstance(texts, str):
            raise ValueError(f"give a list of texts, not the one text {texts!r}.")
        ids = self.tokenizer(texts, self.length).to(self.clip.device)
        return self.clip(input_ids=ids).last_hidden_state

    @torch.inference_mode()
    def compress(self, hidden: Tensor) -> Tensor:
        """CLIP states (B, L, width) -> text latents (B, L, text_dim)."""
        return self.encode_prefix(hidden)


class ImageTokenEncoder:
    """Pictures to CLIP image tokens.

    Args:
        clip: the image tower with its projection.
        mean, std: normalisation per channel, of values in [0, 1].
    """

    def __init__(self, clip: CLIPVisionModelWithProjection, mean: Sequence[float], std: Sequence[float]):
        self.clip, self.size = clip, int(clip.config.image_size)
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None
    ) -> ImageTokenEncoder:
        """Needs "clip_image"."""
        config = checkpoint.config.clip_image
        with skeleton():
            clip = clip_image_model(config)
        checkpoint.load_into(clip, "clip_image", device=device, dtype=dtype)
        return cls(clip, config["image_mean"], config["image_std"])

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Square RGB pictures -> (B, 3, size, size), resized with Pillow's bicubic filter as OpenAI's CLIP does."""
        rows = []
        for image in images:
            if image.mode != "RGB" or image.width != image.height:
                raise ValueError(f"CLIP takes square RGB pictures, not {image.mode} of {image.width} x {image.height}.")
            rows.append(np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC)))
        return self.normalised(torch.from_numpy(np.stack(rows)))

    def normalised(self, levels: Tensor) -> Tensor:
        """Pictures of the encoder's own size, (B, size, size, 3) uint8 -> (B, 3, size, size), where they are."""
        mean, std = (torch.from_numpy(x).to(levels.device) for x in (self.mean, self.std))
        return ((levels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Square RGB pictures (B of them) -> (B, 1, D) projected embeddings, not normalised."""
        return self.of_pixels(self.preprocess(images))

    @torch.inference_mode()
    def of_pixels(self, pixels: Tensor) -> Tensor:
        """What `preprocess` or `normalised` gives, (B, 3, size, size) -> (B, 1, D) projected embeddings."""
        weight = self.clip.visual_projection.weight
        return self.clip(pixel_values=pixels.to(weight.device, weight.dtype)).image_embeds[:, None]


class Autoencoder:
    """Pictures to image latents and back.

    Args:
        vae: diffusers' AutoencoderKL; its attribute "palette", if it has one, is a :class:`.palette.Palette`.
        config: its scale factor and patch size.
        tiling: work tile by tile on pictures larger than the model's own, which bounds memory; seams are blended.
    """

    def __init__(self, vae: AutoencoderKL, config: VAEConfig, tiling: bool = False):
        self.vae, self.config = vae, config
        self.palette: Palette | None = getattr(vae, "palette", None)
        if tiling:
            vae.enable_tiling()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None, tiling: bool = False
    ) -> Autoencoder:
        """Needs "vae"."""
        config = checkpoint.config.vae
        with skeleton():
            vae = autoencoder_kl(config, checkpoint.config.image_size // config.patch_size)
        checkpoint.load_into(vae, "vae", rename=vae_to_diffusers, device=device, dtype=dtype)
        return cls(vae, config, tiling)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8): a sample of the posterior times the scale factor.

        Args:
            pixels: sides are multiples of `config.downscale` (8).
            generator: one CPU generator per item, so that an item does not depend on its batch; or one that serves the
                items in turn.

        Raises:
            ValueError: a shape the autoencoder cannot take, or not as many generators as items.
        """
        step = self.config.downscale
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(f"pixels must be (B, 3, H, W) with sides that {step} divides, not {tuple(pixels.shape)}.")
        generators = [generator] * len(pixels) if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures need as many generators, not {len(generators)}.")
        x = pixels.to(self.vae.device, self.vae.dtype)
        mean, std = self._in_batches(self._posterior, x, step)
        shape = mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # on the CPU: the same on any device
        return (mean + std * noise.to(x)) * self.config.scale_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H/8, W/8), scaled -> pixels (B, 3, H, W), about [-1, 1] and not clamped.

        Raises:
            ValueError: a wrong shape, or NaN or infinite values.
        """
        channels = self.config.embed_dim
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"image latents must be (B, {channels}, H/8, W/8), not {tuple(latents.shape)}.")
        if not torch.isfinite(latents).all():
            raise ValueError("the image latents hold NaN or infinite values; lower the guidance or use float32.")
        (x,) = self._in_batches(lambda z: (self._drawn(z),), latents.to(self.vae.device, self.vae.dtype), 1)
        return x

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H/8, W/8) of the latents of pixels (B, 3, H, W) on its own device, scaled."""
        mean, std = self._posterior(pixels)
        return mean * self.config.scale_factor, std * self.config.scale_factor

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, not scaled."""
        found = self.vae.encode(F.pixel_unshuffle(pixels, self.config.patch_size)).latent_dist
        if self.palette is None:
            return found.mean, found.std
        scale = self.config.scale_factor
        return self.palette.coded(found.mean * scale, self.palette.seen(pixels)) / scale, found.std

    def _drawn(self, latents: Tensor) -> Tensor:
        manners = None
        if self.palette is not None:
            manners = self.palette.manners(latents)
            latents = self.palette.cleared(latents)
        x = F.pixel_shuffle(self.vae.decode(latents / self.config.scale_factor).sample, self.config.patch_size)
        return x if self.palette is None or manners is None else self.palette(x, manners)

    def _in_batches(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, downscale: int) -> Sequence[Tensor]:
        """`function` of x (B, C, H, W), in batches of one size where the arithmetic would show another."""
        if not depends_on_batch(self.vae.device, self.vae.dtype):
            return function(x)
        area = x.shape[2] * x.shape[3] // downscale**2  # of the latent
        return in_fixed_batches(function, math.ceil(ROWS / area), x)


def _without_text_model(names: Iterable[str]) -> Recipes:
    return {name.removeprefix("text_model."): Recipe((name,)) for name in names}
