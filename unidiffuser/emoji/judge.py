"""The judge: a small classifier of a picture's concept and style.

It is trained on real pictures of the `train` split only, never on generated ones and never on the pairs that a model is tested
on, so its own accuracy on real held-out pictures (the ceiling of every score) can be measured and is reported beside each
score. Training is in `unidiffuser.emoji.judge_training`.

    python -m unidiffuser.emoji.judge_training --data FOLDER --out FILE
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..media.files import replacing
from ..media.images import to_tensor

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).with_name("judge.safetensors")
FORMAT = "unidiffuser-judge"
VERSION = "2"
SIDE = 128  # pixels, the bundled model's side: styles differ in fine detail
CONCEPT_SIDE = 64  # pixels; enough for concepts, and insensitive to the finest detail
WAVES = (1.0, 2.0, 4.0)  # frequencies of the colour encoding, half periods over the range of a channel


@dataclass(frozen=True)
class Verdict:
    """The class of one picture; `confidence` in [0, 1] is the probability of the label."""

    label: str
    style: str
    confidence: float


def at_side(images: Tensor, side: int) -> Tensor:
    """Pictures (B, C, H, W) averaged to (B, C, side, side)."""
    return images if images.shape[-2:] == (side, side) else F.adaptive_avg_pool2d(images, side)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016); `stride` 2 halves the sides.

    The maths is that of `small.stem.ConvBlock`; the names of its weights are those of the published judge file.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class Strokes(nn.Module):
    """Style features (B, 2 * width) from colours and from differences between neighbouring pixels.

    An emoji set has a palette, and fills with one colour, a gradient or a texture. A sinusoidal encoding separates the colours
    of a palette; differences are amplified, since those of a gradient are small.
    """

    def __init__(self, width: int):
        super().__init__()
        inputs = 3 * (1 + 2 * len(WAVES)) + 6
        self.pixels = nn.Conv2d(inputs, 24, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.near = nn.Conv2d(24, 40, 4, 2, 1, bias=False)
        self.near_norm = nn.BatchNorm2d(40)
        self.far = Block(40, width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W even."""
        phases = [math.pi * wave * images for wave in WAVES]
        slopes = [
            (8 * F.pad(images.diff(dim=3), (0, 1, 0, 0))).tanh(),
            (8 * F.pad(images.diff(dim=2), (0, 0, 0, 1))).tanh(),
        ]
        x = torch.cat([images, *(x.sin() for x in phases), *(x.cos() for x in phases), *slopes], dim=1)
        x = F.relu(self.norm(self.pixels(x.contiguous(memory_format=torch.channels_last))))
        x = self.far(F.relu(self.near_norm(self.near(x))))
        return torch.cat([x.mean(dim=(2, 3)), x.float().var(dim=(2, 3)).add(1e-4).sqrt().to(x.dtype)], dim=1)


class Judge(nn.Module):
    """Two classifiers of about 0.8 M parameters together, for the concept and for the style.

    Args:
        labels: of the concepts, in the order of the head's outputs.
        styles: likewise.
        widths: channels at 1/2, 1/4 and 1/8 of `CONCEPT_SIDE`, and of the style features.
    """

    def __init__(self, labels: Sequence[str], styles: Sequence[str], widths: tuple[int, int, int, int] = (40, 88, 112, 64)):
        super().__init__()
        self.labels, self.styles, self.widths = tuple(labels), tuple(styles), widths
        low, mid, high, texture = widths
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 3, 64, 64) -> (B, 12, 32, 32)
            nn.Conv2d(12, low, 3, 1, 1, bias=False),
            nn.BatchNorm2d(low),
            nn.ReLU(),
            Block(low, low),
        )
        self.concept_body = nn.Sequential(Block(low, mid, 2), Block(mid, high, 2), Block(high, high))
        self.concept_head = nn.Linear(high * 4, len(self.labels))
        self.strokes = Strokes(texture)
        self.style_head = nn.Linear(texture * 2, len(self.styles))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the concepts (B, concepts) and styles (B, styles) of pictures (B, 3, H, W) in [-1, 1], any size."""
        return self.concept_logits(images), self.style_logits(images)

    def concept_logits(self, images: Tensor) -> Tensor:
        low = self.stem(at_side(images, CONCEPT_SIDE).contiguous(memory_format=torch.channels_last))
        # Features of each quadrant are kept apart, since pictures of one concept share their layout across styles.
        layout = F.adaptive_avg_pool2d(self.concept_body(low), 2).flatten(1)
        return cast(Tensor, self.concept_head(layout))

    def style_logits(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.style_head(self.strokes(at_side(images, SIDE))))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 128) -> list[Verdict]:
        """One verdict for each picture of (B, 3, H, W) in [-1, 1], `batch` at a time."""
        self.eval()
        verdicts = []
        for chunk in images.split(batch):
            concepts, styles = self(chunk)
            confidence, best = concepts.softmax(dim=1).max(dim=1)
            for label, style, probability in zip(
                best.tolist(), styles.argmax(dim=1).tolist(), confidence.tolist(), strict=True
            ):
                verdicts.append(Verdict(self.labels[label], self.styles[style], probability))
        return verdicts

    def classify(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """One verdict for each picture; all must be of one size."""
        return self.judge(to_tensor(images)) if images else []

    def among(self, labels: Collection[str]) -> Judge:
        """The judge restricted to these labels, for a model that knows fewer concepts.

        Raises:
            ValueError: it knows none of the labels.
        """
        wanted = set(labels)
        kept = [k for k, label in enumerate(self.labels) if label in wanted]
        if not kept:
            raise ValueError("the judge knows none of these labels; train one on this data, or remove `judge` from the config")
        narrow = Judge([self.labels[k] for k in kept], self.styles, self.widths)
        head = {f"concept_head.{name}": value.detach()[kept] for name, value in self.concept_head.named_parameters()}
        narrow.load_state_dict(self.state_dict() | head)
        return narrow.eval()

    def digest(self) -> str:
        """SHA-256 over labels and weights."""
        digest = hashlib.sha256(json.dumps([self.labels, self.styles], ensure_ascii=False).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights, labels and sizes to one safetensors file, completely or not at all."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "concepts": json.dumps(self.labels, ensure_ascii=False),
            "styles": json.dumps(self.styles),
            "widths": json.dumps(self.widths),
        }
        tensors = {
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)


def load_judge(path: str | Path = BUNDLED) -> Judge:
    """Read a judge written by `Judge.save`, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, not a judge, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: train a judge with `python -m unidiffuser.emoji.judge_training --data FOLDER --out {path}`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a judge's file (format {metadata.get('format')!r})")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} is a judge of version {metadata.get('version')}, this reads version {VERSION}: train it again"
        )
    low, mid, high, texture = json.loads(metadata["widths"])
    judge = Judge(json.loads(metadata["concepts"]), json.loads(metadata["styles"]), (low, mid, high, texture))
    judge.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
    return judge.eval()
