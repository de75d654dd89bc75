"""Stage "fine-tune": trains all weights of a network on latent shards of one's own pictures, and keeps what it knows.

The weights that are trained: the whole network, and the transformer blocks of the caption decoder. Encoders, autoencoder and
the decoder's embeddings stay, so that latents keep their meaning. A frozen copy of both predicts what the prior samples are
held to.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..data.shards import LatentShards, posterior_sample
from ..encoders.captions import CaptionDecoder
from ..media.images import contact_sheet, to_images
from ..streams import Streams
from ..uvit import UViT
from .changing_model import ChangingModel
from .network import example_cost, export_model
from .prior_data import caption_tokens
from .prior_stage import PriorStage, Shown
from .sharding import is_sharded
from .stage import Batch, ExampleCost

SAMPLES = 6  # pictures in a row of the sample grid


class TunedModel(ChangingModel):
    """A network, and a caption decoder if given, with all or most weights in training, beside frozen copies.

    Args:
        network: float32; it is changed in place.
        captioner: the caption decoder, likewise, or None.
    """

    def __init__(self, network: UViT, captioner: CaptionDecoder | None):
        super().__init__()
        self.original = copy.deepcopy(network).requires_grad_(False)
        self.original_captioner = None if captioner is None else copy.deepcopy(captioner).requires_grad_(False)
        self.network, self.captioner = network.requires_grad_(True), captioner
        if captioner is not None:
            captioner.requires_grad_(False)
            captioner.gpt.transformer.h.requires_grad_(True)

    @contextmanager
    def before(self) -> Iterator[tuple[UViT, CaptionDecoder | None]]:
        yield self.original, self.original_captioner


class FineTuneStage(PriorStage):
    """Trains a network on latent shards and writes a complete checkpoint.

    Args:
        model: network and caption decoder.
        shards: the pairs to learn, by `data.encode`.
        prior, prior_tokens: see `PriorStage`.
        checkpoint: the source of all other parts of the result; its config is the result's.
        out: the file to write.
        keep, kept_each, decode: see `PriorStage`.

    Raises:
        ValueError: shards without their captions, of an older version.
    """

    model: TunedModel

    def __init__(
        self,
        model: TunedModel,
        shards: LatentShards,
        prior: Streams,
        prior_tokens: Tensor | None,
        checkpoint: Checkpoint,
        out: Path,
        *,
        keep: float = 2.0,
        kept_each: int = 1,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.shards, self.checkpoint, self.out = shards, checkpoint, out
        self.captions: list[tuple[str, ...]] = shards.captions()
        flat = [caption for captions in self.captions for caption in captions]
        self.first = torch.tensor([0, *map(len, self.captions)]).cumsum(0)  # rows of a pair's captions in `tokens`
        tokens = [[0]] * len(flat) if model.captioner is None else caption_tokens(model.captioner, flat).tolist()
        more: dict[str, Any] = {"keep": keep, "kept_each": kept_each, "decode": decode}
        super().__init__(model, len(shards), prior, tokens, prior_tokens, **more)

    def order(self, batch_size: int, seed: int, step: int) -> Tensor:
        return self.shards.order(batch_size, seed, step)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.captions).encode())
        for _, stream in self.prior.items():
            digest.update(stream.contiguous().cpu().numpy().tobytes())
        return f"{self.shards.fingerprint} {digest.hexdigest()[:16]} keep {self.keep} x {self.kept_each}"

    def cost(self) -> ExampleCost:
        return example_cost(self.model.network.config)

    def example_name(self, index: int) -> str:
        return self.shards.name_of(index)

    def learned(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """Pairs with a new sample of the image's posterior, and one of the picture's captions."""
        examples = []
        for index, row, generator in zip(indices.tolist(), self.shards.read(indices), generators, strict=True):
            caption = int(torch.randint(len(row["text"]), (), generator=generator, device=generator.device))
            img = posterior_sample(row, generator)
            tokens = self.tokens[self.first[index] + caption]
            examples.append({"img": img, "clip_img": row["clip_img"], "text": row["text"][caption], "tokens": tokens})
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def shown(self) -> Shown:
        """Pairs spread over the set, of different captions as far as there are."""
        first: dict[str, int] = {}
        for row, captions in enumerate(self.captions):
            first.setdefault(captions[0], row)
        rows = list(first.values())
        if len(rows) > (count := min(SAMPLES, self.size)):
            rows = [rows[k * len(rows) // count] for k in range(count)]
        else:
            others, missing = [row for row in range(self.size) if row not in first.values()], count - len(rows)
            rows += [others[k * len(others) // missing] for k in range(missing)]
        examples = self.shards.read(torch.tensor(rows))
        read = {name: torch.stack([example[name] for example in examples]) for name in ("mean", "clip_img")}
        text = torch.stack([example["text"][0] for example in examples])
        return Shown([self.captions[row][0] for row in rows], text, Streams(read["mean"], read["clip_img"], text))

    def sample(self, model: Any) -> Image.Image | None:
        """The grid of `PriorStage`, and below it pictures of prior samples' captions: what the model knew before."""
        sheet = super().sample(model)
        if sheet is None or self.decode is None or is_sharded(self.model):
            return sheet
        count = min(len(self.shown().captions), self.prior.batch)
        text = self.prior.need("text")[:count]
        captioner = self.model.original_captioner
        titles = [""] * count if captioner is None else [found[0].text for found in captioner.decode(text, beams=3)]
        pictures = to_images(self.decode(self.draw(text)).cpu())
        kept = contact_sheet(pictures, [f'before: "{title}"' if title else "before" for title in titles], count)
        whole = Image.new("RGB", (max(sheet.width, kept.width), sheet.height + kept.height), "white")
        whole.paste(sheet, (0, 0))
        whole.paste(kept, (0, sheet.height))
        return whole

    def export(self, model: Any) -> None:
        """Write the checkpoint, each weight in the number format that it had."""
        changed = {"uvit": self._as_stored("uvit", self.model.network)}
        if self.model.captioner is not None:
            changed["caption"] = self._as_stored("caption", self.model.captioner)
        export_model(self.checkpoint, self.model.network, self.out, None, self.checkpoint.config.defaults, changed)

    def _as_stored(self, part: str, module: nn.Module) -> dict[str, Tensor]:
        stored, weights = self.checkpoint.state_dict(part), module.state_dict()
        return {name: weights[name].to("cpu", tensor.dtype) for name, tensor in stored.items() if name in weights}
