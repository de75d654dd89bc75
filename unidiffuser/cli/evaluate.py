"""The command `unidiffuser evaluate CONFIG`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .application import announce
from .settings import SHORT

if TYPE_CHECKING:
    from ..evaluation.report import Cells
    from ..evaluation.run import Evaluation

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see unidiffuser/evaluation/configs.", show_default=False)]
Model = Annotated[Optional[str], typer.Option("--model", "-m", help="Instead of the config's model.")]  # noqa: UP045
Out = Annotated[Optional[str], typer.Option("--out", "-o", help="Instead of the config's folder.")]  # noqa: UP045
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="Another setting, as in --set steps=20 --set limit=100."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def evaluate(config: ConfigFile, model: Model = None, out: Out = None, change: Settings = None, quiet: Quiet = False) -> None:
    """Measure a model, or resume an interrupted evaluation: tables, curves and pictures in one report."""
    from ..evaluation.config import EvaluationConfig
    from ..evaluation.loading import load_model
    from ..evaluation.report import tables
    from ..evaluation.run import Evaluation

    settings = EvaluationConfig.from_file(config, change or [], model=model, out=out)
    evaluation = Evaluation(settings, *load_model(settings), progress=not quiet)
    if not quiet:
        _announce(evaluation)
    write_reports(evaluation, tables)


def _announce(evaluation: Evaluation) -> None:
    """Say how long the sampling takes, if that is more than a minute."""
    from ..evaluation.sampling import ModelSampler

    sampler = evaluation.model.sampler(**evaluation.config.options())
    if isinstance(sampler, ModelSampler):
        steps = evaluation.sampling_steps(sampler.options["steps"])
        if steps >= SHORT:
            announce(steps * sampler.model.step_seconds(sampler.options), sampler.model.device, "the whole evaluation")


def write_reports(evaluation: Evaluation, tables: Callable[[Mapping[str, Any]], dict[str, Cells]]) -> None:
    """Run an evaluation, write `scores.md` and `report.html` beside its `scores.json`, and print the tables."""
    from ..evaluation.report import html_report, markdown_report
    from ..media.files import write_text

    report = evaluation.run()
    cells = tables(report)
    table = markdown_report(cells)
    write_text(evaluation.folder / "scores.md", table)
    write_text(evaluation.folder / "report.html", html_report(report, cells, evaluation.runs, evaluation.chosen))
    typer.echo(table)
    typer.echo(f"wrote {evaluation.folder / 'report.html'}", err=True)
