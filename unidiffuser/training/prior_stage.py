"""Learning with prior preservation: new captions produce their pictures, pictures get their captions, everything else stays.

One objective trains both directions, as it covers every pair of noise levels. The frozen text encoder already has a text
latent for a new word; only the caption decoder has never written it, so it learns the spelling. Prior preservation
(Ruiz et al., arXiv 2208.12242) keeps the rest: on samples of the model itself, network and caption decoder are held to their
outputs before training (Li and Hoiem, arXiv 1606.09282), which needs no data. A LoRA and fine-tuning differ in which weights
they train, and in where the pairs come from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..media.images import contact_sheet, to_images
from ..path import NoisePath
from ..samplers import sample
from ..schedule import add_noise
from ..small.network import predicts_noise
from ..streams import MODALITY_OF, Streams, draw_normal, draw_uniform, item_generators
from ..uvit import Block
from .changing_model import ChangingModel, Predictions
from .objective import draw_labels, row_errors
from .prior_data import IGNORED_TOKEN, pad_tokens
from .sharding import is_sharded
from .stage import Batch, TrainingStage

MIX: Mapping[str, float] = {"independent": 0.15, "clean_text": 0.55, "clean_image": 0.2, "equal": 0.1}
"""Noise levels of the pairs to learn: mostly on the two conditional edges of the (t_img, t_text) square, and most on
text-to-image, which is harder to learn than captioning."""
PRIOR_MIX: Mapping[str, float] = {"independent": 0.1, "clean_text": 0.4, "clean_image": 0.4, "equal": 0.1}
"""Noise levels of the prior samples: both directions alike."""
VELOCITY_LABELS: Mapping[str, Any] = {"lean": 0.6, "logit_normal": (0.0, 1.1)}
"""Labels for a network that does not predict noise (`sigma_data`), see `draw_labels`: those that the bundled network was
trained with. Other networks get the paper's."""
CAPTION_NOISE = 0.8  # highest noise on a text latent before it is decoded: a sampled one is never exact
SAMPLES = 4  # pictures, and captions, of the sample grid


class Shown(NamedTuple):
    """What a sample grid shows.

    Attributes:
        captions: N captions to draw.
        text: their latents (N, L, d).
        pairs: streams (N, ...) of pictures to caption.
    """

    captions: list[str]
    text: Tensor
    pairs: Streams


class PriorStage(TrainingStage):
    """Trains a model on pairs while samples of the model itself are held to the outputs from before.

    A subclass has `learned`, `shown` and `export`.

    Args:
        model: the model in training.
        size: number of pairs to learn.
        prior: the three streams of M prior samples, (M, ...) each.
        tokens: targets of the caption decoder, for all captions to learn; empty if it is not trained.
        prior_tokens: (M, T) targets for the prior samples, `IGNORED_TOKEN` after the stop.
        keep: weight of prior preservation against learning.
        kept_each: prior samples in a batch for each pair to learn.
        decode: image latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], for the sample grid; None for no grid.

    Raises:
        ValueError: a caption decoder is to be trained and there are no `prior_tokens`.
    """

    blocks = (Block,)
    model: ChangingModel

    def __init__(
        self,
        model: ChangingModel,
        size: int,
        prior: Streams,
        tokens: Sequence[Sequence[int]],
        prior_tokens: Tensor | None,
        *,
        keep: float = 2.0,
        kept_each: int = 1,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.size, self.prior = model, size, prior
        self.keep, self.kept_each, self.decode = keep, kept_each, decode
        self.velocity = not predicts_noise(model.network.config)
        if model.captioner is None:
            tokens, prior_tokens = [[IGNORED_TOKEN]] * max(1, len(tokens)), torch.full((prior.batch, 1), IGNORED_TOKEN)
        if prior_tokens is None:
            raise ValueError("training the caption decoder needs tokens of the prior samples; make them with decode_tokens")
        both = pad_tokens([*tokens, *prior_tokens.tolist()])
        self.tokens, self.prior_tokens = both[: len(tokens)], both[len(tokens) :]

    @abstractmethod
    def learned(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """Clean streams, and rows of `tokens`, of pairs to learn: "img", "clip_img", "text" and "tokens", (B, ...) each.

        Args:
            indices: (B,) integers in 0..size-1.
            generators: B, for the random numbers of each example.
        """

    @abstractmethod
    def shown(self) -> Shown:
        """What the sample grid shows."""

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        """Each pair with its k prior samples, their labels and noise: every tensor is (B, 1 + k, ...)."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [self._draw(generator) for generator in generators]
        pairs = self.learned(indices, generators)
        rows = torch.stack([rows for rows, _ in drawn])  # (B, k)
        prior = {name: stream[rows] for name, stream in self.prior.items()} | {"tokens": self.prior_tokens[rows]}
        both = {name: torch.cat([value[:, None], prior[name]], dim=1) for name, value in pairs.items()}
        return both | {name: torch.stack([draw[name] for _, draw in drawn]) for name in drawn[0][1]}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The random numbers of one example: which prior samples (k,), and labels and noise (1 + k, ...)."""
        count = 1 + self.kept_each
        rows = torch.randint(self.prior.batch, (self.kept_each,), generator=generator, device=generator.device)
        options = VELOCITY_LABELS if self.velocity else {}
        drawn = [draw_labels(size, mix, generator, **options) for size, mix in ((1, MIX), (self.kept_each, PRIOR_MIX))]
        labels = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        noise = {f"noise_{name}": draw_normal((count, *stream.shape[1:]), generator) for name, stream in self.prior.items()}
        text = self.prior.need("text")
        level = CAPTION_NOISE * draw_uniform((count, 1, 1), generator)
        caption = level * draw_normal((count, *text.shape[1:]), generator)
        return rows, {"t_img": labels["img"], "t_text": labels["text"], "caption_noise": caption} | noise

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """ "noise" and "caption" (errors on the pairs), "prior_noise" and "prior_caption" (distance from the prior)."""
        count = len(batch["t_img"])
        flat = {name: value.transpose(0, 1).flatten(0, 1) for name, value in batch.items()}  # (B, 1 + k, ...) -> (B + Bk, ...)
        labels = {"img": flat["t_img"], "text": flat["t_text"]}
        names = [name for name, _ in self.prior.items()]
        noised = Streams(**{n: add_noise(flat[n], flat[f"noise_{n}"], labels[MODALITY_OF[n]].float()) for n in names})
        out: Predictions = model(
            count, noised, labels["img"], labels["text"], flat["text"] + flat["caption_noise"], flat["tokens"]
        )
        targets = [torch.cat([flat[f"noise_{n}"][:count], x.float()]) for n, x in zip(names, out.prior_noise, strict=True)]
        rows = [row_errors(n, x, y, labels, self.velocity) for n, x, y in zip(names, out.noise, targets, strict=True)]
        errors, elements = (torch.stack(values).sum(0) for values in zip(*rows, strict=True))
        error = errors / elements  # (B + Bk,), weighted as in the objective that trained the network
        terms = {"noise": error[:count].mean(), "prior_noise": error[count:].mean()}
        if out.logits is not None and out.prior_logits is not None:
            terms |= _caption_terms(out.logits, out.prior_logits, flat["tokens"])
        prior = sum(value for name, value in terms.items() if name.startswith("prior"))
        loss = terms["noise"] + terms.get("caption", 0) + self.keep * prior
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def sample(self, model: Any) -> Image.Image | None:
        """Pictures of captions, and below them captions of as many training pictures."""
        if self.decode is None or is_sharded(self.model):  # a part of a sharded model cannot run by itself
            return None
        shown = self.shown()
        count, device = len(shown.captions), next(self.model.network.parameters()).device
        drawn = self.draw(shown.text)
        pairs = shown.pairs.map(lambda x: x.to(device))
        pixels = torch.cat([self.decode(x).cpu() for x in (drawn, pairs.need("img"))])
        written = self.write(pairs)
        titles = [*(f'"{caption}"' for caption in shown.captions), *(f"= {caption}" for caption in written)]
        return contact_sheet(to_images(pixels), titles, count)

    def draw(self, text: Tensor) -> Tensor:
        """Image latents (N, C, h, w) of text latents (N, L, d), in 10 steps at guidance 3."""
        network = self.model.network
        given = Streams(text=text.to(next(network.parameters()).device))
        generators = item_generators(0, len(text))
        return sample(network, NoisePath.text_to_image(10), given, guidance=3.0, generator=generators).need("img")

    def write(self, pairs: Streams) -> list[str]:
        """Captions of N pictures, in 10 steps at guidance 3; empty if the caption decoder is not trained."""
        if self.model.captioner is None:
            return [""] * pairs.batch
        path, generators = NoisePath.image_to_text(10), item_generators(0, pairs.batch)
        read = sample(self.model.network, path, pairs.replace(text=None), guidance=3.0, generator=generators)
        return [found[0].text for found in self.model.captioner.decode(read.need("text"), beams=3)]


def _caption_terms(logits: Tensor, prior_logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Losses of the caption decoder: cross-entropy on the pairs, divergence from the prior on the M prior samples.

    Args:
        logits: (B + M, T, V), pairs first.
        prior_logits: (M, T, V) without adapters.
        tokens: (B + M, T) targets.
    """
    count = len(tokens) - len(prior_logits)
    caption = F.cross_entropy(logits[:count].float().flatten(0, 1), tokens[:count].flatten(), ignore_index=IGNORED_TOKEN)
    prior = _divergence(prior_logits, logits[count:], tokens[count:] != IGNORED_TOKEN)
    return {"caption": caption, "prior_caption": prior}


def _divergence(prior: Tensor, now: Tensor, valid: Tensor) -> Tensor:
    """Kullback-Leibler divergence of next-token distributions, prior (B, T, V) from now, mean over `valid` (B, T)."""
    old, new = prior.float().log_softmax(-1), now.float().log_softmax(-1)
    return ((old.exp() * (old - new)).sum(-1) * valid).sum() / valid.sum()
