"""The training commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .application import command

if TYPE_CHECKING:
    from ..training.stages import Build


@command("train")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; see unidiffuser/training/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Replaces the number of steps in the config.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Replaces the run folder in the config.")] = None,  # noqa: UP045
) -> None:
    """Train one stage; an interrupted run continues from its last checkpoint."""
    from ..training.stages import STAGES

    run_stage(config, steps, out, STAGES)


def run_stage(config: Path, steps: int | None, out: str | None, stages: Mapping[str, Build]) -> None:
    """Train the stage of a config file; `steps` and `out` replace the file's unless None."""
    from ..training.config import TrainConfig
    from ..training.loop import train as run
    from ..training.stages import make_stage

    settings = TrainConfig.from_file(config, steps=steps, out=out)
    run(make_stage(settings, stages), settings)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"done: {settings.out}")


@command("train-lora")
def train_lora(
    pictures: Annotated[Path, typer.Argument(help="Folder of 4 to 8 pictures of the new thing.", show_default=False)],
    word: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Caption of the pictures that have none in metadata.jsonl or in a .txt file beside them."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("runs/lora"),
    model: Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 800,
    batch_size: Annotated[int, typer.Option(help="New pairs in a step, with as many prior samples.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 2e-3,
    rank: Annotated[int, typer.Option(help="Rank of the adapters. A higher rank learns more and forgets more.", min=1)] = 32,
    kept: Annotated[int, typer.Option(help="Samples of the model itself, for prior preservation.", min=1)] = 320,
    variations: Annotated[
        int,
        typer.Option(
            help="Variations of each picture, slightly rotated, zoomed and shifted. 1: the pictures as they are.", min=1
        ),
    ] = 4,
    captions: Annotated[bool, typer.Option(help="Train the caption decoder to write the words.")] = True,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a LoRA: a new word produces a picture, and the picture gets the word. An interrupted run continues."""
    from ..training.loop import train as run
    from ..training.lora_run import FILE, lora_config, lora_stage

    options = {"data": str(pictures), "word": word, "checkpoint": model, "rank": rank, "kept": kept}
    config = lora_config(
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        options={**options, "variations": variations, "captions": captions},
    )
    run(lora_stage(config), config, progress=not quiet)
    typer.echo(f"wrote {out / FILE}", err=True)
