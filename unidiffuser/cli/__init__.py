"""The command line: `unidiffuser text-to-image "red apple, twemoji"` and its sisters, one command per task.

Results go to files, captions also to stdout, bars and messages to stderr. Exit codes: 0 done, 2 bad input (one line says
what to do), 130 interrupted. Nothing here imports torch before a command runs, so that help and mistakes answer at once.
"""

from . import checkpoints, distill, download, editing, many, paths, tasks, train  # each adds its commands to the application
from .application import app, command, repair_streams
from .data import app as data_app
from .evaluate import evaluate

__all__ = ["app", "checkpoints", "distill", "download", "editing", "main", "many", "paths", "tasks", "train"]

EVALUATE = ("unidiffuser evaluate coco.yaml", "unidiffuser evaluate coco.yaml --set steps=20 --set limit=100")
command("evaluate", panel=checkpoints.FILES, examples=EVALUATE)(evaluate)
app.add_typer(data_app, name="data", rich_help_panel=checkpoints.FILES)


def main() -> None:
    """Entry point of the console script and of `python -m unidiffuser`."""
    repair_streams()
    app()
