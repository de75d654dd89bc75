"""The command line: `unidiffuser text-to-image "red apple, twemoji"` and its sisters, one command per task.

Results go to files, captions also to stdout, bars and messages to stderr. Exit codes: 0 done, 2 bad input (one line says
what to do), 130 interrupted. Nothing here imports torch before a command runs, so that help and mistakes answer at once.
"""

from . import tasks, train  # each adds its commands to the application
from .application import app, command
from .data import app as data_app
from .evaluate import evaluate

__all__ = ["app", "main", "tasks", "train"]

command("evaluate")(evaluate)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of the console script and of `python -m unidiffuser`."""
    app()
