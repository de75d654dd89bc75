"""CLIP encoders of prompts and images (arXiv 2303.06555, section 4).

A text latent is CLIP's last hidden state through the caption decoder's first Linear layer. An image token is CLIP's projected
image embedding, not normalised. The towers are transformers' modules, built directly on a checkpoint's weights. They are
annotated as Any, so that transformers is imported only where one is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.keys import Recipe, Recipes
from ..checkpoints.tokenizers import BytePairTokenizer
from ..small.stem import ConvStem, Norm, no_norm

Device = torch.device | str | None


def clip_text_model(config: dict[str, Any]) -> Any:
    """CLIPTextModel of a `ModelConfig.clip_text`, fresh weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def clip_image_model(config: dict[str, Any], norm: Norm = no_norm) -> Any:
    """CLIPVisionModelWithProjection of a `ModelConfig.clip_image`, fresh weights.

    Args:
        config: fields of CLIPVisionConfig; with "stem", a `ConvStem` of these arguments replaces the patch embedding.
        norm: normalisation layer of the stem, which only its training needs.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    fields = {name: value for name, value in config.items() if name not in ("image_mean", "image_std", "stem")}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))
    if "stem" in config:
        tower.vision_model.embeddings.patch_embedding = ConvStem(**config["stem"], norm=norm)
    return tower


class TextEncoder:
    """Encoder of prompts to text latents.

    Args:
        clip: transformers' CLIPTextModel.
        encode_prefix: the caption decoder's Linear layer from CLIP's width to text_dim.
        tokenizer: the tokenizer of `clip`.
        length: L, tokens of a text latent.
    """

    def __init__(self, clip: Any, encode_prefix: nn.Module, tokenizer: BytePairTokenizer, length: int):
        self.clip, self.encode_prefix, self.tokenizer, self.length = clip, encode_prefix, tokenizer, length

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Load the part "clip_text" of a checkpoint and the first layer of its "caption"."""
        config = checkpoint.config
        with checkpoint.building("clip_text"):
            clip = clip_text_model(config.clip_text)
            linear = nn.Linear(config.caption.prefix_dim, config.caption.hidden_dim)
        prefixed = any(name.startswith("text_model.") for name in clip.state_dict())
        rename = None if prefixed else _without_text_model
        checkpoint.load_into(clip, "clip_text", rename=rename, device=device, dtype=dtype)
        checkpoint.load_into(linear, "caption", prefix="encode_prefix.", device=device, dtype=dtype)
        return cls(clip, linear, checkpoint.clip_tokenizer(), config.uvit.num_text_tokens)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode prompts.

        Args:
            texts: B prompts; "" is the empty caption. One of more than L - 2 tokens is cut.

        Returns:
            Text latents (B, L, text_dim).

        Raises:
            ValueError: `texts` is a single string.
        """
        return self.compress(self.hidden(texts))

    @torch.inference_mode()
    def hidden(self, texts: Sequence[str]) -> Tensor:
        """CLIP's last hidden state (B, L, width) of B texts, after its final layer norm."""
        if isinstance(texts, str):
            raise ValueError(f"the prompts must be a list of texts, not the single text {texts!r}; put it into a list.")
        ids = self.tokenizer(texts, self.length).to(self.clip.device)
        return self.clip(input_ids=ids).last_hidden_state

    @torch.inference_mode()
    def compress(self, hidden: Tensor) -> Tensor:
        """Text latents (B, L, text_dim) of CLIP's hidden states (B, L, width)."""
        return self.encode_prefix(hidden)


class ImageTokenEncoder:
    """Encoder of images to CLIP image tokens.

    Args:
        clip: transformers' CLIPVisionModelWithProjection.
        mean, std: normalisation of each channel, for values in [0, 1].
    """

    def __init__(self, clip: Any, mean: Sequence[float], std: Sequence[float]):
        self.clip, self.size = clip, int(clip.config.image_size)
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None
    ) -> ImageTokenEncoder:
        """Load the part "clip_image" of a checkpoint."""
        config = checkpoint.config.clip_image
        with checkpoint.building("clip_image"):
            clip = clip_image_model(config)
        checkpoint.load_into(clip, "clip_image", device=device, dtype=dtype)
        return cls(clip, config["image_mean"], config["image_std"])

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Resize, with Pillow's bicubic filter like OpenAI's CLIP, and normalise.

        Args:
            images: B square RGB images.

        Returns:
            (B, 3, size, size) float32 on the CPU.

        Raises:
            ValueError: an image is not square or not RGB.
        """
        rows = []
        for image in images:
            if image.mode != "RGB" or image.width != image.height:
                raise ValueError(
                    f"CLIP takes square RGB pictures, not {image.mode} of {image.width} x {image.height}; crop it first."
                )
            rows.append(np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC)))
        return self.normalise(torch.from_numpy(np.stack(rows)))

    def normalise(self, levels: Tensor) -> Tensor:
        """Normalise images of the encoder's own size.

        Args:
            levels: (B, size, size, 3) uint8.

        Returns:
            (B, 3, size, size) float32, on the device of `levels`.
        """
        mean, std = (torch.from_numpy(x).to(levels.device) for x in (self.mean, self.std))
        return ((levels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP image tokens (B, 1, D) of B square RGB images."""
        return self.encode_pixels(self.preprocess(images))

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """CLIP image tokens (B, 1, D) of the output of `preprocess` or `normalise`."""
        weight = self.clip.visual_projection.weight
        return self.clip(pixel_values=pixels.to(weight.device, weight.dtype)).image_embeds[:, None]


def _without_text_model(names: Iterable[str]) -> Recipes:
    return {name.removeprefix("text_model."): Recipe((name,)) for name in names}
