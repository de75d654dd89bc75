"""The evaluation's part of the command line: ``unidiffuser evaluate CONFIG``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file; see unidiffuser/evaluation/configs.", show_default=False)],
    model: Annotated[Optional[str], typer.Option("--model", "-m", help="Instead of the config's model.")] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option("--out", "-o", help="Instead of the config's folder.")] = None,  # noqa: UP045
    change: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Another setting, as in --set steps=20 --set limit=100."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Measure a model, or go on where a measurement was stopped: tables, curves and pictures in one report."""
    from unidiffuser.evaluation.config import EvaluationConfig
    from unidiffuser.evaluation.report import html_report, markdown_report
    from unidiffuser.evaluation.run import Evaluation
    from unidiffuser.evaluation.subject import open_subject
    from unidiffuser.media.files import write_text

    settings = EvaluationConfig.from_file(config, change or [])
    settings.model, settings.out = model or settings.model, out or settings.out
    evaluation = Evaluation(settings, *open_subject(settings), progress=not quiet)
    report = evaluation.run()
    folder, table = Path(settings.out), markdown_report(report)
    write_text(folder / "scores.md", table)
    write_text(folder / "report.html", html_report(report, evaluation.runs, evaluation.chosen))
    typer.echo(table)
    typer.echo(f"wrote {folder / 'report.html'}", err=True)
