"""Training stage of a LoRA: adapters learn a few pairs, held in memory as latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.lora import write_lora
from .adapters import AdaptedModel
from .lora_data import LoRAData
from .prior_data import caption_tokens
from .prior_stage import PriorStage, Shown
from .stage import Batch

SAMPLES = 4  # pictures, and captions, of the sample grid


class LoRAStage(PriorStage):
    """Trains the adapters of a model and writes the LoRA file.

    Args:
        model: network and caption decoder with fresh adapters.
        data: pairs to learn and prior samples.
        out: the file to write.
        keep, kept_each, decode: see `PriorStage`.
        about: metadata of the file, beside its captions and rank.

    Raises:
        ValueError: a caption decoder is to be trained and `data` has no `prior_tokens`.
    """

    model: AdaptedModel

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
        self.data, self.out, self.about = data, out, dict(about or {})
        size, captioner = len(data.captions), model.captioner
        tokens = [[0]] * size if captioner is None else caption_tokens(captioner, data.captions).tolist()
        more: dict[str, Any] = {"keep": keep, "kept_each": kept_each, "decode": decode}
        super().__init__(model, size, data.prior, tokens, data.prior_tokens, **more)

    def fingerprint(self) -> str:
        return f"{self.data.fingerprint()} rank {self.model.rank} keep {self.keep} x {self.kept_each}"

    def learned(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        return {name: stream[indices] for name, stream in self.data.pairs.items()} | {"tokens": self.tokens[indices]}

    def shown(self) -> Shown:
        """The first captions; pictures are spread over the set if there is one caption."""
        different = list(dict.fromkeys(self.data.captions))
        captions = [different[k % len(different)] for k in range(SAMPLES)]
        first = torch.tensor([self.data.captions.index(caption) for caption in captions])
        rows = first
        if len(different) == 1:
            rows = (first + torch.arange(SAMPLES) * max(1, self.size // SAMPLES)) % self.size
        return Shown(captions, self.data.pairs.need("text")[first], self.data.pairs.map(lambda x: x[rows]))

    def export(self, model: Any) -> None:
        """Write the LoRA file."""
        words = list(dict.fromkeys(self.data.captions))
        write_lora(self.out, model.changes(), {"words": words, "rank": self.model.rank, **self.about})
