"""Model, judge and data that the claims are shown with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from ...data.captioned import Pair
from ...evaluation.metrics import success_rate
from ...options import Options, resolve
from ...pipeline import UniDiffuser
from ..baselines import parse_caption
from ..judge import Judge, Verdict
from .report import write_sheet

BATCH = 48  # items in the network at once
SHOWN = 8  # columns of a sheet
Row = tuple[str, str, str]  # setting, measure, value


@dataclass(frozen=True)
class Bench:
    """Model, judge and data for all claims.

    Attributes:
        trained, held: pairs that the network was trained on, and held-out ones, in a fixed order.
        options: steps and guidance.
        out: folder of the sheets.
    """

    model: UniDiffuser
    judge: Judge
    trained: Sequence[Pair]
    held: Sequence[Pair]
    options: dict[str, Any]
    out: Path

    def verdicts(self, pictures: Sequence[Image.Image]) -> list[Verdict]:
        return self.judge.classify(pictures)

    def parsed(self, caption: str) -> tuple[str, str | None]:
        return parse_caption(caption, self.judge.styles)

    def sheet(self, name: str, pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = SHOWN) -> None:
        write_sheet(self.out / f"{name}.jpg", pictures, captions, columns)

    def plan(self) -> Options:
        options: dict[str, Any] = {**self.options, "batch_size": BATCH}
        return resolve(cast(Options, options), self.model.config)

    def recognised(self, setting: str, pictures: Sequence[Image.Image], pairs: Sequence[Pair], kept: str = "") -> list[Row]:
        """Two rows: the rates of pictures with the right concept and with the right style."""
        seen = list(zip(self.verdicts(pictures), pairs, strict=True))
        return [
            (setting, f"concept{kept}", rate([verdict.label == pair.label for verdict, pair in seen])),
            (setting, f"style{kept}", rate([verdict.style == pair.style for verdict, pair in seen])),
        ]


def rate(right: Sequence[bool]) -> str:
    return str(success_rate([list(right)]))


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of pictures (B, 3, H, W) in [-1, 1], one number a pair."""
    return (a - b).square().mean(dim=(1, 2, 3)).sqrt()
