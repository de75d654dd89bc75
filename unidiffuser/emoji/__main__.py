"""`python -m unidiffuser.emoji`: data, training and evaluation of the bundled model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..cli.application import command
from ..cli.evaluate import ConfigFile, Model, Out, Quiet, Settings

app = typer.Typer(help="How the bundled model is made.", no_args_is_help=True, pretty_exceptions_enable=False)


@command("prepare", app)
def prepare_pictures(
    out: Annotated[Path, typer.Argument(help="Folder to make: pictures, captions and the split.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.", min=16)] = 256,
    workers: Annotated[int, typer.Option(help="Rendering processes.", min=1)] = 2,
) -> None:
    """Make the demonstration data: fetch the emoji sets with npm, render, caption and split them."""
    from .prepare import prepare

    typer.echo(f"{prepare(out, size, workers=workers)} pictures in {out}")


@command("train", app)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; unidiffuser/emoji/recipe.yaml is that for a data-centre GPU.")],
    out: Annotated[Path, typer.Argument(help="Folder of the sections; the finished model is OUT/model.safetensors.")],
    quiet: Quiet = False,
) -> None:
    """Make the model of a recipe. Started again, it skips finished sections and resumes the interrupted one.

    On a machine with a GPU, both commands one after the other make a model and its table:

    python -m unidiffuser.emoji train unidiffuser/emoji/recipe.yaml OUT

    python -m unidiffuser.emoji evaluate unidiffuser/emoji/evaluation.yaml --model OUT/model.safetensors --out OUT/evaluation
    """
    from .recipe import Recipe

    settings = Recipe.from_file(recipe)  # a mistake shows before torch is imported
    from .sections import train_recipe

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    typer.echo(f"wrote {train_recipe(settings, out, progress=not quiet)}")


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
