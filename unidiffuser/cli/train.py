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
    config: Annotated[Path, typer.Argument(help="YAML file of one run; see unidiffuser/training/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Instead of the config's number of steps.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Instead of the config's folder.")] = None,  # noqa: UP045
) -> None:
    """Train one stage, or go on where it was stopped."""
    from ..training.stages import STAGES

    run_stage(config, steps, out, STAGES)


def run_stage(config: Path, steps: int | None, out: str | None, stages: Mapping[str, Build]) -> None:
    """Train what a config file names, one of `stages`; `steps` and `out` win over the file's."""
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
        typer.Option(help="Caption of pictures that have none in metadata.jsonl or in a text file beside them."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("runs/lora"),
    model: Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 800,
    batch_size: Annotated[int, typer.Option(help="Pairs to learn in a step, and as many to keep.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="At its highest.", min=0)] = 2e-3,
    rank: Annotated[int, typer.Option(help="Of the matrices; more can hold more, and forgets more.", min=1)] = 32,
    kept: Annotated[int, typer.Option(help="Pairs of the model's own that keep what it knows.", min=1)] = 320,
    variations: Annotated[int, typer.Option(help="Of each picture, slightly moved; 1: as they are.", min=1)] = 4,
    captions: Annotated[bool, typer.Option(help="Teach the caption decoder to write the words.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Teach a model a new thing: its word calls the picture, and its picture calls the word. Goes on where it was stopped."""
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
