"""The caption decoder of a checkpoint, behind the host's patcher."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ..unidiffuser.checkpoints.checkpoint import Checkpoint
from .memory_errors import say_what_to_do

if TYPE_CHECKING:
    from ..unidiffuser.encoders.captions import Caption, CaptionDecoder

PREVIEW_TOKENS = 12


class HostCaptionDecoder:
    """The library's caption decoder, loaded and freed by the host's memory management."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config.caption

    @cached_property
    def decoder(self) -> CaptionDecoder:
        # NOTE: imported and built when first used: transformers' GPT-2 takes seconds, and images do not need it.
        from ..unidiffuser.encoders.captions import CaptionDecoder

        return CaptionDecoder.from_checkpoint(self.checkpoint)

    @cached_property
    def patcher(self) -> comfy.model_patcher.ModelPatcher:
        management = comfy.model_management
        return comfy.model_patcher.ModelPatcher(
            self.decoder,
            load_device=management.text_encoder_device(),
            offload_device=management.text_encoder_offload_device(),
        )

    def decode(self, text: Tensor, **settings: Any) -> list[list[Caption]]:
        """Captions of text latents (B, L, hidden_dim) or CLIP text (B, L, prefix_dim); see `CaptionDecoder.decode`.

        Raises:
            ValueError: `text` is of another text encoder, or a setting is out of range.
        """
        length, widths = self.config.prefix_length, (self.config.hidden_dim, self.config.prefix_dim)
        if text.shape[-1] not in widths or text.shape[1] < length:
            raise ValueError(
                f"The CONDITIONING is {text.shape[1]} x {text.shape[2]}, this caption decoder needs {length} x {widths[0]}. "
                f"Connect the CONDITIONING output of a 'UniDiffuser Sampler' of the same checkpoint."
            )
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        device = self.patcher.load_device
        text = text[:, :length].to(device, torch.float32)
        with torch.inference_mode(), say_what_to_do():
            latents = text if text.shape[-1] == widths[0] else self._compressed(text)
            return self.decoder.decode(latents, **settings)

    def _compressed(self, text: Tensor) -> Tensor:
        """Text latents (B, L, hidden_dim) of CLIP text, computed in the dtype of the stored weights."""
        linear = self.decoder.encode_prefix
        return linear(text.to(linear.weight.dtype)).float()

    def drafts(self, latents: Tensor) -> list[str]:
        """First words of text latents (B, L, hidden_dim), decoded greedily on the device where the decoder is now."""
        weight = self.decoder.decode_prefix.weight
        with torch.inference_mode():
            latents = latents.to(weight.device, torch.float32)
            return [found[0].text for found in self.decoder.decode(latents, beams=1, max_new_tokens=PREVIEW_TOKENS)]
