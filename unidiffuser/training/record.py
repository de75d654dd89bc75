"""What a run tells about itself: losses and their curve, speed, TensorBoard."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..media.files import read_lines, replacing, write_text
from .curve import draw_curve
from .stage import ExampleCost

log = logging.getLogger(__name__)

# Dense bf16 matrix products with float32 sums, TFLOP/s of one device, from the makers' data sheets. Longest name first.
PEAKS = {
    "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "A10G": 70.0, "A40": 149.7, "L40S": 362.0, "L4": 121.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of a known GPU in bf16; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


class LossLog:
    """``losses.jsonl`` (one line a step) and its curve; lines after the step that is resumed are dropped."""

    def __init__(self, out: Path, start: int):
        self.path = out / "losses.jsonl"
        self.rows: list[dict[str, float]] = []
        if self.path.is_file():
            for line in read_lines(self.path):
                if line and (row := json.loads(line))["step"] < start:
                    self.rows.append(row)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.pending: list[dict[str, float]] = []

    def add(self, step: int, terms: dict[str, float]) -> None:
        row = {"step": step, **terms}
        self.rows.append(row)
        self.pending.append(row)

    def flush(self) -> None:
        """Write the new lines; called before the checkpoint that continues after them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.pending)
        self.pending = []

    def recent(self, window: int = 50) -> dict[str, float]:
        rows = self.rows[-window:]
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[-1] if k != "step"}

    def draw(self) -> None:
        """``losses.png``."""
        with replacing(self.path.with_name("losses.png")) as partial:
            draw_curve(self.rows).save(partial)


class Speed:
    """Examples and tokens a second, and the share of the devices' peak in matrix products.

    Operations are counted as the model needs them: what is computed a second time going backwards
    (``checkpoint_activations``) does not count, so the share is comparable between settings.
    """

    def __init__(self, out: Path, batch_size: int, cost: ExampleCost | None, peak_tflops: float | None, devices: int):
        self.path = out / "speed.json"
        self.batch_size, self.cost = batch_size, cost
        self.peak = None if peak_tflops is None else peak_tflops * 1e12 * devices
        self.marks: list[float] = []

    def tick(self) -> None:
        """A step is done."""
        self.marks.append(time.perf_counter())

    def rates(self, window: int | None = None) -> dict[str, float]:
        """Over the last ``window`` steps, or all but the first two, which warm up."""
        marks = self.marks[-window - 1 :] if window else self.marks[1:] if len(self.marks) > 2 else self.marks
        if len(marks) < 2:
            return {}
        rates = {"samples_per_s": self.batch_size * (len(marks) - 1) / (marks[-1] - marks[0])}
        if self.cost is not None:
            rates["tokens_per_s"] = rates["samples_per_s"] * self.cost.tokens
            rates["tflops"] = rates["samples_per_s"] * self.cost.flops / 1e12
            if self.peak is not None:
                rates["share_of_peak"] = rates["tflops"] * 1e12 / self.peak
        return rates

    def write(self) -> None:
        """``speed.json``: the rates of this process's whole run."""
        write_text(self.path, json.dumps(self.rates(), indent=1))


class Board:
    """TensorBoard, where it is wanted; entries after the step that is resumed are dropped."""

    def __init__(self, out: Path, wanted: bool, start: int):
        self.writer: Any = None
        if wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError('tensorboard: true needs TensorBoard; pip install "unidiffuser[train]"') from error
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, image: Image.Image, step: int) -> None:
        if self.writer is not None:
            import numpy as np

            self.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
