"""Logs of a run: losses and their curve, speed, TensorBoard.

Written by hand: a resumed run drops the entries after its checkpoint, so that no step is logged twice, in every log alike.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..distributed import World
from ..media.files import read_lines, replacing, write_text
from ..media.json_files import parse_object
from .config import TrainConfig
from .curve import draw_curve
from .stage import ExampleCost

LOG_EVERY = 10  # steps between updates of the progress bar and of TensorBoard

# Dense bf16 matrix products with float32 sums, TFLOP/s of one device, from the makers' data sheets. Longest name first.
PEAKS = {
    "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "A10G": 70.0, "A40": 149.7, "L40S": 362.0, "L4": 121.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """Peak TFLOP/s of a known GPU in bf16; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


class RunLog:
    """All logs of one run. Only the main process writes; in the others every method does nothing.

    Args:
        config: settings of the run.
        cost: compute of one example, or None.
        start: steps done when the run was started or resumed.
        world: this process among all.
    """

    def __init__(self, config: TrainConfig, cost: ExampleCost | None, start: int, world: World):
        out = Path(config.out)
        self.config, self.main = config, world.main
        self.speed = Speed(out, config.batch_size, cost, config.peak_tflops or peak_of(world.device), world.size)
        if self.main:
            self.losses = LossLog(out, start)
        self.board = Board(out, config.tensorboard and self.main, start)

    def add(self, step: int, terms: dict[str, float], gradient_norm: float) -> dict[str, str]:
        """Log a finished 0-based step.

        Returns:
            what the progress bar shows; empty in the steps in which it stays as it is.
        """
        self.speed.tick()
        if not self.main:
            return {}
        self.losses.add(step, terms)
        done = step + 1
        if done % LOG_EVERY:
            return {}
        rates = self.speed.rates(LOG_EVERY)
        self.board.add("loss", self.losses.recent(LOG_EVERY), done)
        self.board.add("speed", rates | {"learning_rate": self.config.rate(step), "gradient_norm": gradient_norm}, done)
        return {k: f"{v:.4g}" for k, v in (self.losses.recent() | rates).items() if k != "tflops"}

    def sampled(self, picture: Image.Image | None, done: int) -> None:
        """Log a sample and draw the loss curve."""
        if self.main:
            if picture is not None:
                self.board.picture(picture, done)
            self.losses.draw()

    def flush(self) -> None:
        """Write losses and speed; call it before the checkpoint that continues after them."""
        if self.main:
            self.losses.flush()
            self.speed.write()

    def close(self) -> None:
        self.board.close()


def _row(line: str) -> dict[str, float] | None:
    """A line of the log; None for half a line, which a killed process may leave."""
    try:
        row = parse_object(line, "the line")
    except ValueError:
        return None
    whole = "step" in row and all(isinstance(value, (int, float)) for value in row.values())
    return row if whole else None


class LossLog:
    """`losses.jsonl` (one line a step) and its curve; lines after the step that is resumed are dropped."""

    def __init__(self, out: Path, start: int):
        self.path = out / "losses.jsonl"
        self.rows: list[dict[str, float]] = []
        if self.path.is_file():
            for line in filter(None, read_lines(self.path)):
                row = _row(line)
                if row is not None and row["step"] < start:
                    self.rows.append(row)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.pending: list[dict[str, float]] = []

    def add(self, step: int, terms: dict[str, float]) -> None:
        """Keep the terms of a step until `flush`."""
        row = {"step": step, **terms}
        self.rows.append(row)
        self.pending.append(row)

    def flush(self) -> None:
        """Append the new lines to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.pending)
        self.pending = []

    def recent(self, window: int = 50) -> dict[str, float]:
        """Mean of each term over the last steps."""
        rows = self.rows[-window:]
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[-1] if k != "step"}

    def draw(self) -> None:
        """Write `losses.png`."""
        with replacing(self.path.with_name("losses.png")) as partial:
            draw_curve(self.rows).save(partial)


class Speed:
    """Examples and tokens per second, and the fraction of the devices' peak in matrix products.

    Only the operations that the model needs count, not those that activation checkpointing repeats, so the fraction is
    comparable between settings.
    """

    def __init__(self, out: Path, batch_size: int, cost: ExampleCost | None, peak_tflops: float | None, devices: int):
        self.path = out / "speed.json"
        self.batch_size, self.cost = batch_size, cost
        self.peak = None if peak_tflops is None else peak_tflops * 1e12 * devices
        self.marks: list[float] = []

    def tick(self) -> None:
        """Note the time at which a step ended."""
        self.marks.append(time.perf_counter())

    def rates(self, window: int | None = None) -> dict[str, float]:
        """Rates over the last `window` steps, or over all but the first two, which warm up; empty if there are too few."""
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
        """Write `speed.json`: the rates since this process started."""
        write_text(self.path, json.dumps(self.rates(), indent=1))


class Board:
    """TensorBoard, if `wanted`; entries after the step that is resumed are dropped.

    Raises:
        ValueError: TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, wanted: bool, start: int):
        self.writer: Any = None
        if wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError('tensorboard: true needs TensorBoard; pip install "unidiffuser[train]"') from error
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        """Log scalars under `group/name`."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, image: Image.Image, step: int) -> None:
        """Log an image under `samples`."""
        if self.writer is not None:
            import numpy as np

            self.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
