"""Training stage of a LoRA: a new caption produces the picture, the picture gets the caption, everything else stays.

One objective trains both directions, as it covers every pair of noise levels. The frozen text encoder already has a text
latent for a new word; only the caption decoder has never written it, so adapters there learn the spelling. Prior preservation
(Ruiz et al., arXiv 2208.12242) keeps the rest: on samples of the model itself, network and caption decoder are held to their
outputs without adapters (Li and Hoiem, arXiv 1606.09282), which needs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..media.images import contact_sheet, to_images
from ..path import NoisePath
from ..runtime.lora import write_lora
from ..samplers import sample
from ..schedule import add_noise
from ..small.network import predicts_noise
from ..streams import MODALITY_OF, Streams, item_generators
from ..uvit import Block
from .adapters import AdaptedModel, Predictions
from .lora_data import IGNORED_TOKEN, LoRAData, caption_tokens, pad_tokens
from .objective import draw_labels, row_errors
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


class LoRAStage(TrainingStage):
    """Trains the adapters of a model and writes the LoRA file.

    Args:
        model: network and caption decoder with fresh adapters.
        data: pairs to learn and prior samples.
        out: the file to write.
        keep: weight of prior preservation against learning.
        kept_each: prior samples in a batch for each pair to learn.
        decode: image latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], for the sample grid; None for no grid.
        about: metadata of the file, beside its captions and rank.

    Raises:
        ValueError: a caption decoder is to be trained and `data` has no `prior_tokens`.
    """

    blocks = (Block,)

    def __init__(
        self,
        model: AdaptedModel,
        data: LoRAData,
        out: Path,
        *,
        keep: float = 2.0,
        kept_each: int = 1,
        decode: Callable[[Tensor], Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self.model: AdaptedModel = model
        self.data, self.out, self.keep, self.kept_each = data, out, keep, kept_each
        self.velocity = not predicts_noise(model.network.config)
        self.decode = decode
        self.about = dict(about or {})
        self.size = len(data.captions)
        if model.captioner is None:
            self.tokens = torch.full((self.size + data.prior.batch, 1), IGNORED_TOKEN)
        else:
            if data.prior_tokens is None:
                raise ValueError("training the caption decoder needs LoRAData.prior_tokens; make them with decode_tokens")
            self.tokens = pad_tokens([*caption_tokens(model.captioner, data.captions).tolist(), *data.prior_tokens.tolist()])

    def fingerprint(self) -> str:
        return f"{self.data.fingerprint()} rank {self.model.rank} keep {self.keep} x {self.kept_each}"

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        """Each pair with its k prior samples, their labels and noise: every tensor is (B, 1 + k, ...)."""
        pairs = {name: stream[indices] for name, stream in self.data.pairs.items()} | {"tokens": self.tokens[indices]}
        drawn = [self._draw(torch.Generator().manual_seed(seed)) for seed in seeds]
        rows = torch.stack([rows for rows, _ in drawn])  # (B, k)
        prior = {name: stream[rows] for name, stream in self.data.prior.items()}
        prior["tokens"] = self.tokens[self.size + rows]
        both = {name: torch.cat([value[:, None], prior[name]], dim=1) for name, value in pairs.items()}
        return both | {name: torch.stack([draw[name] for _, draw in drawn]) for name in drawn[0][1]}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The random numbers of one example: which prior samples (k,), and labels and noise (1 + k, ...)."""
        count = 1 + self.kept_each
        rows = torch.randint(self.data.prior.batch, (self.kept_each,), generator=generator)
        options = VELOCITY_LABELS if self.velocity else {}
        drawn = [draw_labels(size, mix, generator, **options) for size, mix in ((1, MIX), (self.kept_each, PRIOR_MIX))]
        labels = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        noise = {
            f"noise_{name}": torch.randn(count, *stream.shape[1:], generator=generator)
            for name, stream in self.data.pairs.items()
        }
        text = self.data.pairs.need("text")
        level = CAPTION_NOISE * torch.rand(count, 1, 1, generator=generator)
        caption = level * torch.randn(count, *text.shape[1:], generator=generator)
        return rows, {"t_img": labels["img"], "t_text": labels["text"], "caption_noise": caption} | noise

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """ "noise" and "caption" (errors on the pairs), "prior_noise" and "prior_caption" (distance from the prior)."""
        count = len(batch["t_img"])
        flat = {name: value.transpose(0, 1).flatten(0, 1) for name, value in batch.items()}  # (B, 1 + k, ...) -> (B + Bk, ...)
        labels = {"img": flat["t_img"], "text": flat["t_text"]}
        names = [name for name, _ in self.data.pairs.items()]
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
        """Pictures of the first captions, and below them captions of as many training pictures."""
        if self.decode is None or is_sharded(self.model):  # a part of a sharded model cannot run by itself
            return None
        captions, rows = self._sampled()
        network, device = self.model.network, next(self.model.network.parameters()).device
        text = self.data.pairs.need("text")[[self.data.captions.index(caption) for caption in captions]]
        settings: dict[str, Any] = {"guidance": 3.0, "generator": item_generators(0, SAMPLES)}
        drawn = sample(network, NoisePath.text_to_image(10), Streams(text=text.to(device)), **settings)
        shown = self.data.pairs.map(lambda x: x[rows].to(device))
        pixels = torch.cat([self.decode(x).cpu() for x in (drawn.need("img"), shown.need("img"))])
        written = [""] * SAMPLES
        if self.model.captioner is not None:
            settings["generator"] = item_generators(0, SAMPLES)
            read = sample(network, NoisePath.image_to_text(10), shown.replace(text=None), **settings)
            written = [found[0].text for found in self.model.captioner.decode(read.need("text"), beams=3)]
        titles = [*(f'"{caption}"' for caption in captions), *(f"= {caption}" for caption in written)]
        return contact_sheet(to_images(pixels), titles, SAMPLES)

    def _sampled(self) -> tuple[list[str], Tensor]:
        """Captions, and rows of pictures, of the sample grid; pictures are spread over the set if there is one caption."""
        different = list(dict.fromkeys(self.data.captions))
        captions = [different[k % len(different)] for k in range(SAMPLES)]
        rows = torch.tensor([self.data.captions.index(caption) for caption in captions])
        if len(different) == 1:
            rows = (rows + torch.arange(SAMPLES) * max(1, self.size // SAMPLES)) % self.size
        return captions, rows

    def export(self, model: Any) -> None:
        """Write the LoRA file."""
        words = list(dict.fromkeys(self.data.captions))
        write_lora(self.out, model.changes(), {"words": words, "rank": self.model.rank, **self.about})


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
