"""`python -m unidiffuser.emoji`: data, training stages, assembly and evaluation of the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..cli.application import command
from ..cli.evaluate import ConfigFile, Model, Out, Quiet, Settings

app = typer.Typer(help="How the bundled model is made.", no_args_is_help=True, pretty_exceptions_enable=False)


@command("prepare", app)
def prepare_pictures(
    out: Annotated[Path, typer.Argument(help="Folder to make: pictures, captions and the split.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.", min=16)] = 128,
    workers: Annotated[int, typer.Option(help="Rendering processes.", min=1)] = 2,
) -> None:
    """Make the demonstration data: fetch the emoji sets with npm, render, caption and split them."""
    from .prepare import prepare

    records = prepare(out, size, workers=workers)
    typer.echo(f"{len(records)} pictures in {out}")


@command("train", app)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of one run; see unidiffuser/emoji/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Replaces the config's number of steps.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Replaces the config's folder.")] = None,  # noqa: UP045
) -> None:
    """Train one stage, or resume an interrupted run."""
    from ..cli.train import run_stage
    from .stages import STAGES

    run_stage(config, steps, out, STAGES)


@command("assemble", app)
def assemble(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs autoencoder, encoders and captioner.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; the uvit stage starts from it.")],
) -> None:
    """Combine trained encoders into one checkpoint, ready for training the network."""
    from .assemble import assemble as run

    typer.echo(f"wrote {run(runs, out)}")


@command("evaluate", app)
def evaluate(config: ConfigFile, model: Model = None, out: Out = None, change: Settings = None, quiet: Quiet = False) -> None:
    """Measure a model with the judge's scores, or resume an interrupted evaluation; unidiffuser/emoji/evaluation.yaml."""
    from ..cli.evaluate import write_reports
    from .evaluation import JudgedConfig, open_evaluation
    from .scores import tables

    settings = JudgedConfig.from_file(config, change or [], model=model, out=out)
    write_reports(open_evaluation(settings, progress=not quiet), tables)


if __name__ == "__main__":
    app()
