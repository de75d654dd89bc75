"""`unidiffuser download`: the authors' 1 B checkpoint, with its licence."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import command
from .checkpoints import FILES


class Version(str, Enum):
    """Published checkpoints."""

    v1 = "v1"
    v0 = "v0"


@command(
    "download",
    panel=FILES,
    examples=[
        "unidiffuser download v1",
        "unidiffuser download v1 --out ComfyUI/models/unidiffuser/unidiffuser-v1 --accept-licence",
    ],
)
def download_checkpoint(
    version: Annotated[Version, typer.Argument(help="v1, trained on cleaner pairs, or v0.", show_default=False)],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Folder of the checkpoint; ./unidiffuser-v1 or -v0 if not given."),
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the weights' licence (AGPL-3.0) without being asked.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no list of files.")] = False,
) -> None:
    """Download the published 1 B checkpoint (about 5.5 GB).

    Run it again to continue after a break. HF_ENDPOINT names a mirror of huggingface.co.
    """
    from ..checkpoints.checkpoint import load_checkpoint
    from ..checkpoints.download import download, is_accepted, licence_notice

    folder = out or Path(f"unidiffuser-{version.value}")
    if not accept_licence and not is_accepted(version.value, folder):
        typer.echo(licence_notice(version.value), err=True)
        if not is_terminal():
            raise ValueError("the licence above is not accepted yet; run this again with --accept-licence")
        if not typer.confirm("Accept the licence and download?", err=True):
            raise typer.Exit(1)
        accept_licence = True

    def report(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    download(version.value, folder, accept_licence=accept_licence, progress=not quiet, report=report)
    load_checkpoint(folder)  # reads the headers: a clear error now instead of in the first task
    typer.echo(folder)
    if not quiet:
        typer.echo(f'try: unidiffuser text-to-image "an astronaut on a horse" --model "{folder}"', err=True)


def is_terminal() -> bool:
    """Whether a question can be answered."""
    return sys.stdin.isatty()
