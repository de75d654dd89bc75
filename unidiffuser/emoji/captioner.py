"""Training of the caption decoder: it reconstructs captions, with CLIP frozen (paper, section 5.1).

It also defines the text latent, Linear(CLIP width -> hidden_dim). Two things make that latent a good diffusion target for a
small model: it is normalised to zero mean and unit variance per dimension, and noise is added before decoding, so the Linear
separates captions widely and the decoder tolerates the sampler's errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.config import CaptionConfig
from ..checkpoints.tokenizers import STOP, BytePairTokenizer
from ..encoders.captions import CaptionDecoder
from ..media.files import write_text
from ..streams import draw_normal, draw_uniform
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, seeded_init
from .image_folder import training_set
from .options import Captioner
from .text_encoder import load_text_encoder
from .vocabulary import gpt2_vocabulary


class NoisyCaptioner(nn.Module):
    """A caption decoder in training: CLIP text -> normalised, noisy text latents -> logits of the tokens."""

    def __init__(self, decoder: CaptionDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, hidden: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
        """hidden (B, L, width), tokens (B, T), noise (B, L, hidden_dim) -> logits (B, T, vocabulary)."""
        latents = self.decoder.encode_prefix(hidden).float()
        latents = (latents - latents.mean((0, 1))) / (latents.std((0, 1)) + 1e-5)
        logits: Tensor = self.decoder(latents + noise, tokens)
        return logits.float()


class CaptionerStage(TrainingStage):
    """Trains a caption decoder on the captions of an image folder.

    Args:
        config: settings of the run.
        options: those of the section `captioner`.
        data: the image folder.
        text_encoder: folder of the finished run of `TextEncoderStage`.
    """

    def __init__(self, config: TrainConfig, options: Captioner, data: Path, text_encoder: Path):
        self.out, self.noise = Path(config.out), options.noise
        clip, clip_tokenizer, clip_sizes = load_text_encoder(text_encoder)
        length = clip_sizes["max_position_embeddings"]
        records = training_set(data, 1, options.where).records
        self.texts = sorted({text for record in records for text in record["text"]})
        self.size = len(self.texts)
        self.tokenizer = BytePairTokenizer.from_spec(spec := gpt2_vocabulary(self.texts, options.vocabulary_size))
        stop = spec["vocab"][STOP]
        with torch.no_grad():
            ids = clip_tokenizer(self.texts, length)
            self.hidden = torch.cat([clip(input_ids=chunk).last_hidden_state for chunk in ids.split(256)])
        rows = [[*self.tokenizer.encode(text)[: options.max_new_tokens - 1], stop] for text in self.texts]
        width = max(map(len, rows))
        self.tokens = torch.tensor([row + [-100] * (width - len(row)) for row in rows])  # -100: no loss
        self.config = CaptionConfig(
            gpt2={
                "vocab_size": len(self.tokenizer),
                "n_positions": length + options.max_new_tokens,
                "n_embd": options.width,
                "n_layer": options.layers,
                "n_head": max(1, options.width // 64),
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            },
            prefix_length=length,
            prefix_dim=clip_sizes["hidden_size"],
            hidden_dim=options.hidden_dim,
            stop_token_id=stop,
            max_new_tokens=options.max_new_tokens,
        )
        with seeded_init(config.seed):
            self.model = NoisyCaptioner(CaptionDecoder(self.config, self.tokenizer))
        self.model.decoder.gpt.config._attn_implementation = "eager"  # faster backwards for short sequences on a CPU

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"hidden": self.hidden[indices], "tokens": self.tokens[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        hidden, tokens = batch["hidden"], batch["tokens"]
        level = self.noise * draw_uniform((len(hidden), 1, 1), generator)
        noise = level * draw_normal((*hidden.shape[:2], self.config.hidden_dim), generator)
        logits = model(hidden, tokens.clamp_min(0), noise.to(hidden))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=-100)
        right = (logits.argmax(-1) == tokens) | (tokens == -100)
        return {"loss": loss, "wrong": 1 - right.all(1).float().mean() + 1e-4}

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """Write `caption.pt`, with the normalisation folded into `encode_prefix`, `caption.json` and `result.json`."""
        decoder = model.decoder
        hidden = self.hidden.to(decoder.encode_prefix.weight.device)
        latents = decoder.encode_prefix(hidden)
        mean, std = latents.mean((0, 1)), latents.std((0, 1))
        decoder.encode_prefix.weight /= std[:, None]
        decoder.encode_prefix.bias.sub_(mean).div_(std)
        torch.save({name: value.cpu() for name, value in decoder.state_dict().items()}, self.out / "caption.pt")
        write_text(self.out / "caption.json", json.dumps({**vars(self.config), "tokenizer": self.tokenizer.spec}))
        decoded = decoder.decode(decoder.encode_prefix(hidden[:512]), beams=3)
        exact = sum(c[0].text == t for c, t in zip(decoded, self.texts[:512], strict=True)) / min(512, self.size)
        write_text(self.out / "result.json", json.dumps({"exact": exact, "texts": self.size}))
