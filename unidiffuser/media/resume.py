"""Resumable work: numbered parts, each of which is one file, complete or absent.

Several processes divide the parts among them. A run that was interrupted is started again with the same settings, skips the
parts that are finished and computes the others exactly as an uninterrupted run would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_text
from .json_files import read_object

if TYPE_CHECKING:
    from ..distributed import World

LONGEST_VALUE = 40  # characters of a setting that an error message quotes


def check_settings(file: Path, settings: Mapping[str, Any], world: World | None = None) -> None:
    """Store the settings of the results beside them, or check that they agree with those stored by an earlier run.

    Args:
        file: JSON file in the folder of the results.
        settings: everything that the results depend on, as JSON values; a missing one equals None.
        world: the processes that do the work; all of them call this.

    Raises:
        ValueError: the results were made with other settings; names those that differ.
    """
    if (world is None or world.main) and not file.is_file():
        write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    if world is not None:
        world.barrier()
    there = read_object(file, "use another folder")
    here = json.loads(json.dumps(settings))  # as it would be read: a tuple is a list there
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        listed = ", ".join(_difference(name, there.get(name), here.get(name)) for name in differing)
        raise ValueError(
            f"{file.parent} holds results made with other settings ({listed}); use another folder, or the same settings"
        )


def _difference(name: str, there: Any, here: Any) -> str:
    short = max(len(str(there)), len(str(here))) <= LONGEST_VALUE
    return f"{name} {there} there, {here} here" if short else name


def run_parts(
    files: Sequence[Path],
    make: Callable[[int], None],
    world: World | None = None,
    *,
    valid: Callable[[int], bool] = lambda number: True,
    finished: Callable[[int], Any] = lambda number: None,
) -> None:
    """Make the unfinished parts of this process: part k belongs to process k modulo their number.

    Args:
        files: the file of each part.
        make: writes the file of a part, given its number, with `media.files.replacing` or a function built on it; if it cannot
            be made, `make` either raises or leaves no file.
        world: the processes that do the work; None is a single one.
        valid: whether the file of a part, which exists, still counts.
        finished: called after each part, also if it was there already.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    for number in range(rank, len(files), size):
        if not (files[number].is_file() and valid(number)):
            make(number)
        finished(number)
