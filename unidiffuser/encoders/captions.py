"""Caption decoder: a GPT-2 that takes a text latent as its prefix.

It follows ClipCap (Mokady et al., arXiv 2111.09734): a text latent (L, hidden_dim) becomes L input embeddings of GPT-2, which
continues with the caption. It was trained on text reconstruction before the diffusion model, so its `encode_prefix` also
defines the space of text latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import CaptionConfig
from ..streams import generators_for
from .beam_search import beam_search, nucleus_sampling
from .candidate import Caption as Caption


class CaptionDecoder(nn.Module):
    """GPT-2 with a text latent as its prefix.

    State-dict keys are the original's: encode_prefix, decode_prefix, gpt.

    Args:
        config: sizes, see `CaptionConfig`.
        tokenizer: used by `decode` only, through `tokenizer.decode(ids, skip_special_tokens=True) -> str`; without it texts
            are empty.

    Raises:
        ValueError: GPT-2 has too few positions for the prefix and a caption of `max_new_tokens`.
    """

    def __init__(self, config: CaptionConfig, tokenizer: Any = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        gpt2 = GPT2Config(**{"bos_token_id": config.stop_token_id, "eos_token_id": config.stop_token_id} | config.gpt2)
        needed = config.prefix_length + config.max_new_tokens
        if gpt2.n_positions < needed:
            raise ValueError(
                f"the caption decoder has {gpt2.n_positions} positions, but a prefix of {config.prefix_length} and "
                f"{config.max_new_tokens} new tokens need {needed}; raise gpt2.n_positions"
            )
        self.encode_prefix = nn.Linear(config.prefix_dim, config.hidden_dim)
        self.decode_prefix = nn.Linear(config.hidden_dim, gpt2.n_embd)
        self.gpt = GPT2LMHeadModel(gpt2)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CaptionDecoder:
        """Load the part "caption" of a checkpoint and its tokenizer."""
        tokenizer = checkpoint.gpt2_tokenizer()
        with checkpoint.building("caption"):
            decoder = cls(checkpoint.config.caption, tokenizer)
        return checkpoint.load_into(decoder, "caption", device=device, dtype=dtype)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced logits, for training.

        Args:
            latents: (B, L, hidden_dim).
            tokens: (B, T) token ids.

        Returns:
            (B, T, V): the logits that predict each of `tokens`.
        """
        embeds = torch.cat((self.decode_prefix(latents), self.gpt.transformer.wte(tokens)), dim=1)  # (B, L + T, n_embd)
        hidden = self.gpt.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.gpt.lm_head(hidden[:, latents.shape[1] - 1 : -1])

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,
        method: str = "beam",
        *,
        beams: int = 5,
        count: int = 1,
        max_new_tokens: int | None = None,
        top_p: float = 0.8,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> list[list[Caption]]:
        """Decode text latents to captions.

        Args:
            latents: (B, L, hidden_dim), as the diffusion model generates them.
            method: "beam" for the beam search of the paper's code (deterministic); "nucleus" for sampling from the smallest
                set of tokens with `top_p` of the probability (Holtzman et al., arXiv 1904.09751).
            beams: width of the beam search, at least 1.
            count: candidates per item; at most `beams` for the beam search.
            max_new_tokens: longest caption in tokens; None for the checkpoint's limit, 67 in the published ones.
            top_p: fraction of the probability that nucleus sampling keeps, in (0, 1].
            temperature: divides the logits; above 0.
            generator: for "nucleus": one per item, or one to derive them from; None for a random seed.

        Returns:
            One list per item, of `count` captions, best score first.

        Raises:
            ValueError: an argument is out of range, or `latents` has a wrong shape, NaN or infinite values.
        """
        self._check(latents, beams, count, max_new_tokens, top_p, temperature)
        if latents.shape[0] == 0:
            return []
        limit = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        weight = self.decode_prefix.weight
        prefix = self.decode_prefix(latents.to(weight.device, weight.dtype))  # (B, L, n_embd)
        if method == "beam":
            if count > beams:
                raise ValueError(f"count={count} captions need at least as many beams, not beams={beams}; raise beams")
            found = beam_search(self.gpt, prefix, self.config.stop_token_id, beams, limit, temperature)
        elif method == "nucleus":
            generators = generators_for(generator, latents.shape[0])
            found = nucleus_sampling(self.gpt, prefix, self.config.stop_token_id, generators, count, limit, top_p, temperature)
        else:
            raise ValueError(f'caption method must be "beam" or "nucleus", got {method!r}')
        return [[self._caption(tokens, score) for tokens, score in item[:count]] for item in found]

    def _caption(self, tokens: list[int], score: float) -> Caption:
        words = [token for token in tokens if token != self.config.stop_token_id]
        text = self.tokenizer.decode(words, skip_special_tokens=True) if self.tokenizer is not None else ""
        return Caption(text.strip(), score, tuple(tokens))

    def _check(
        self, latents: Tensor, beams: int, count: int, max_new_tokens: int | None, top_p: float, temperature: float
    ) -> None:
        if latents.ndim != 3 or latents.shape[2] != self.config.hidden_dim:
            raise ValueError(f"text latents must have shape (B, L, {self.config.hidden_dim}), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("the text latents hold NaN or infinite values; lower the guidance or use dtype float32")
        gpt2 = self.gpt.config
        room = gpt2.n_positions - latents.shape[1]
        if max_new_tokens is not None and not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be between 1 and {room}, got {max_new_tokens}")
        if not 1 <= beams < gpt2.vocab_size:
            raise ValueError(f"beams must be between 1 and {gpt2.vocab_size - 1}, got {beams}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
