"""Pictures and words to latents and back, without a host: CLIP's two towers and the KL autoencoder.

Each class holds a module of transformers or diffusers built straight on a checkpoint's weights, and does the small things
around it that the published model was trained with. Latents are those of arXiv 2303.06555, section 4: a sample of the
autoencoder's posterior times its scale factor, CLIP's projected image embedding as it is, and CLIP's last text states
through the caption decoder's first Linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.keys import Recipe, Recipes
from ..checkpoints.skeleton import skeleton
from ..checkpoints.tokenizers import BytePairTokenizer
from ..small.stem import ConvStem, Norm, no_norm

if TYPE_CHECKING:
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


def _without_text_model(names: Iterable[str]) -> Recipes:
    return {name.removeprefix("text_model."): Recipe((name,)) for name in names}
