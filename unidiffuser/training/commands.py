"""The training part of the command line: ``prepare-emoji``, ``train`` and ``assemble``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer


def prepare_emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make: pictures, captions and the split.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.", min=16)] = 128,
    workers: Annotated[int, typer.Option(help="Rendering processes.", min=1)] = 2,
) -> None:
    """Make the demonstration data: fetch the emoji sets with npm, render them, caption them, split them."""
    from .emoji import prepare

    records = prepare(out, size, workers=workers)
    typer.echo(f"{len(records)} pictures in {out}")


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of one run; see unidiffuser/training/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Instead of the config's number of steps.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Instead of the config's folder.")] = None,  # noqa: UP045
) -> None:
    """Train one stage, or go on where it was stopped."""
    from .loop import TrainConfig
    from .loop import train as run
    from .stages import make_stage

    settings = TrainConfig.from_file(config, steps=steps, out=out)
    run(make_stage(settings), settings)
    typer.echo(f"done: {settings.out}")


def assemble(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs autoencoder, encoders and captioner.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; the uvit stage starts from it.")],
) -> None:
    """Put trained encoders together into one file, ready for training the network."""
    from .stages import assemble as run

    typer.echo(f"wrote {run(runs, out)}")


COMMANDS: dict[str, Callable[..., None]] = {"prepare-emoji": prepare_emoji, "train": train, "assemble": assemble}
