"""The table that people read, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each row of :func:`unidiffuser.evaluation.scores.score`, in per cent."""
    lines = [
        "| task | split | measure | share (95 % interval) | n | judge's ceiling | nearest training | shuffled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = f"{_percent(row['rate'])} ({_percent(row['low'])} to {_percent(row['high'])})"
        marks = [_percent(row.get(name)) for name in ("ceiling", "nearest", "shuffled")]
        cells = [row["task"], row["split"], row["measure"], share, str(row["total"]), *marks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"
