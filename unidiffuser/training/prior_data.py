"""Prior preservation: samples of the model itself, and the captions that it gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.weights import disk_errors
from ..media.files import replacing
from ..path import NoisePath
from ..samplers import sample
from ..streams import Streams, item_generators

if TYPE_CHECKING:
    from ..encoders.captions import CaptionDecoder

PRIOR = "prior.safetensors"  # the prior samples, in the run folder
IGNORED_TOKEN = -100  # the label that torch's cross-entropy skips by default


@dataclass(frozen=True)
class PriorSettings:
    """Settings of learning with prior preservation, named as the YAML options; the defaults suit the bundled model.

    Attributes:
        captions: train the caption decoder too; needed for words that it has never written.
        kept: prior samples, for prior preservation.
        kept_each: prior samples in a step for each pair to learn.
        keep: weight of prior preservation against learning.
        kept_steps: sampling steps of the prior samples.
        guidance: of the prior samples.
        seed: random seed.

    Raises:
        ValueError: a setting out of range.
    """

    captions: bool = True
    kept: int = 320
    kept_each: int = 1
    keep: float = 2.0
    kept_steps: int = 8
    guidance: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kept", "kept_each", "kept_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, got {self.keep}")


def make_prior(
    network: nn.Module,
    captioner: CaptionDecoder,
    settings: PriorSettings,
    watch: Callable[[int], None] = lambda done: None,
    file: Path | None = None,
) -> tuple[Streams, Tensor | None]:
    """Prior samples of a model as the settings want them, and their captions as `decode_tokens` returns them.

    Args:
        network, captioner: on the device to sample on.
        settings: number, steps, guidance and seed; without `captions` there are no tokens.
        watch: called with the number of prior samples done.
        file: where the samples of this network and these settings are kept, for a run that continues; None keeps none.
    """
    options: dict[str, Any] = {"steps": settings.kept_steps, "guidance": settings.guidance, "seed": settings.seed}
    key = _digest(network, settings.kept, options)
    prior = None if file is None else _read(file, key)
    if prior is None:
        prior = sample_prior(network, settings.kept, **options, watch=watch)
        if file is not None:
            with replacing(file) as partial, disk_errors():
                save_file({name: stream.contiguous() for name, stream in prior.items()}, partial, metadata={"key": key})
    return prior, decode_tokens(captioner, prior.need("text")).cpu() if settings.captions else None


def _digest(network: nn.Module, *settings: Any) -> str:
    """Identifies weights, by the beginning of each, and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in network.state_dict().items():
        digest.update(name.encode() + weight.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> Streams | None:
    """The samples in a file; None if there is none, it is damaged, or it belongs to another model or other settings."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("key") != key:
                return None
            return Streams(**{name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return None


def sample_prior(
    net: Callable[..., Any],
    count: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 16,
    watch: Callable[[int], None] = lambda done: None,
) -> Streams:
    """`count` image-caption pairs that a network samples without a prompt, as latents (count, ...) on the CPU.

    Args:
        net: a UViT, on the device to sample on.
        watch: called after each batch with the number of pairs done.
    """
    parts = []
    for first in range(0, count, batch):
        generators = item_generators(seed + first, min(batch, count - first))
        out = sample(net, NoisePath.joint(steps), Streams(), guidance=guidance, generator=generators)
        parts.append(out.map(trainable_copy))
        watch(min(first + batch, count))
    return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})


def decode_tokens(captioner: CaptionDecoder, text: Tensor) -> Tensor:
    """Captions (B, T) that a caption decoder gives text latents (B, L, d), `IGNORED_TOKEN` after the stop."""
    return pad_tokens([found[0].tokens for found in captioner.decode(text, beams=1)])


def caption_tokens(captioner: CaptionDecoder, captions: Sequence[str]) -> Tensor:
    """Target tokens (B, T) of captions, the stop included; captions longer than the decoder writes are cut."""
    most, stop = captioner.config.max_new_tokens, captioner.config.stop_token_id
    return pad_tokens([[*captioner.tokenizer.encode(text)[: most - 1], stop] for text in captions])


def pad_tokens(rows: Sequence[Sequence[int]]) -> Tensor:
    """Lists of tokens as one tensor (B, T), padded at the end with `IGNORED_TOKEN`."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[IGNORED_TOKEN] * (length - len(row))] for row in rows])


def trainable_copy(x: Tensor) -> Tensor:
    """Float32 on the CPU; a clone, as autograd refuses tensors made in inference mode."""
    return x.float().cpu().clone()
