"""The report of an evaluation: tables in Markdown, and one HTML file with tables, curves and pictures inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..data.captioned import Pair
from ..media.images import contact_sheet, open_image
from .optional import require
from .parts import Outputs

Results = Sequence[Mapping[str, Any]]
Cells = list[list[str]]  # a heading and lines of a table
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}summary{cursor:pointer;font-weight:600}
code{background:#f4f4f4;padding:0 .2em}.note{color:#666;font-size:13px}"""


def result_cells(results: Results) -> Cells:
    """All results but a classifier's; "best" says whether high or low is good."""
    cells = [["task", "split", "measure", "value", "seeds", "real", "best"]]
    for row in results:
        value = number(row["value"])
        if "low" in row:
            value += f" ({number(row['low'])} to {number(row['high'])})"
        seeds = " ".join(number(v) for v in row["values"]) if len(row["values"]) > 1 else "1"
        cells.append([row["task"], row["split"], row["measure"], value, seeds, number(row.get("real")), row["best"] or "-"])
    return cells


def sweep_cells(points: Results) -> Cells:
    """Cells of a sweep: a row for each value of the option."""
    names = list(points[0])
    return [names, *[[number(point[name]) for name in names] for point in points]]


def timing_cells(results: Results) -> Cells:
    """Cells of the timings: a row for each task."""
    heading = ["task", "seconds an item (median)", "items"]
    return [heading, *[[r["task"], number(r["seconds"]), str(r["items"])] for r in results]]


def tables(report: Mapping[str, Any]) -> dict[str, Cells]:
    """Title -> cells of each table of a report without a classifier."""
    sweeps = {f"{option.capitalize()} sweep": sweep_cells(points) for option, points in report["sweeps"].items()}
    return {"Measured": result_cells(report["measures"])} | sweeps | {"Timing": timing_cells(report["timing"])}


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    heading, *lines = cells
    marked = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in marked) + "\n"


def markdown_report(tables: Mapping[str, Cells]) -> str:
    """All tables that have lines, each under its heading; without the timing, which differs from run to run."""
    shown = {title: cells for title, cells in tables.items() if len(cells) > 1 and title != "Timing"}
    return "\n".join(f"## {title}\n\n{markdown(cells)}" for title, cells in shown.items())


def html_report(
    report: Mapping[str, Any],
    tables: Mapping[str, Cells],
    runs: Mapping[tuple[str, str], Sequence[Outputs]],
    chosen: Mapping[str, Sequence[Pair]],
) -> str:
    """One self-contained page.

    Args:
        report: contents of `scores.json`.
        tables: title -> cells; a table "Guidance sweep" or "Steps sweep" is followed by its curves.
        runs: (task, split) -> outputs of each seed; the first seed's pictures are shown.
        chosen: split -> the pairs used as input.

    Raises:
        ValueError: there are curves to draw and matplotlib is missing.
    """
    config = report["config"]
    body = [f"<h1>Evaluation of {html.escape(str(config['model']))}</h1>"]
    used = {name: html.escape(str(value)[:40]) for name, value in report["eyes"].items() if value}
    extractors = ", ".join(f"{name} <code>{value}</code>" for name, value in used.items())
    body.append(f"<p>Feature extractors: {extractors}. Seeds {', '.join(map(str, config['seeds']))}.</p>")
    for title, cells in tables.items():
        if len(cells) < 2:
            continue
        body.append(f"<h2>{title}</h2>{_html_table(cells)}")
        points = report["sweeps"].get(title.split()[0].lower())
        if points:
            body.append(_image(curves(points, title.split()[0].lower()), "PNG"))
    notes = sorted({result["note"] for result in report["measures"] if result.get("note")})
    body += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    body.append("<h2>Pictures</h2><p>The first of a fixed shuffle, not selected.</p>")
    for (task, split), outputs in runs.items():
        sheet = grid(outputs[0], chosen.get(split, []))
        if sheet is not None:
            body.append(f"<details open><summary>{task}, {split}</summary>{_image(sheet, 'JPEG')}</details>")
    settings = html.escape("\n".join(f"{key}: {value}" for key, value in config.items()))
    body.append(f"<h2>Settings</h2><pre>{settings}</pre>")
    head = f"<meta charset='utf-8'><title>Evaluation</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def grid(outputs: Outputs, pairs: Sequence[Pair]) -> Image.Image | None:
    """The pictures that were kept, each above its caption, generated or given."""
    if not outputs.shown:
        return None
    generated = [item.get("caption") for item in outputs.items[: len(outputs.shown)]]
    given = [pair.caption for pair in pairs] + [""] * len(generated)
    captions = [given[k] if caption is None else caption for k, caption in enumerate(generated)]
    return contact_sheet(outputs.shown, captions)


def curves(points: Results, option: str) -> Image.Image:
    """Each measure of a sweep over the option's values and, with CLIP, FID over CLIP score as in the paper."""
    figure_module, canvas = require("matplotlib.figure"), require("matplotlib.backends.backend_agg")
    names = [name for name in points[0] if name not in ("value", "n", "distance among pictures") and "R@" not in name]
    pareto = "CLIP score" in names
    figure = figure_module.Figure(figsize=(3.2 * (len(names) + pareto), 2.8), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names) + pareto, squeeze=False)[0]
    values = [point["value"] for point in points]
    for axis, name in zip(axes, names, strict=False):
        axis.plot(values, [point[name] for point in points], marker="o", markersize=3)
        axis.set(title=name, xlabel=option)
    if pareto:
        axes[-1].plot([p["CLIP score"] for p in points], [p["FID"] for p in points], marker="o", markersize=3)
        for point in points:
            axes[-1].annotate(f"{point['value']:g}", (point["CLIP score"], point["FID"]), fontsize=7)
        axes[-1].set(title=f"over {option}", xlabel="CLIP score", ylabel="FID")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return open_image(buffer.getvalue())


def number(value: float | None) -> str:
    """Four significant digits; "-" for None."""
    return "-" if value is None else f"{value:.4g}"


def percent(rate: float | None) -> str:
    """A rate in per cent with one decimal; "-" for None."""
    return "-" if rate is None else f"{100 * rate:.1f}"


def _html_table(cells: Sequence[Sequence[str]]) -> str:
    heading, *lines = cells
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    rows = ["".join(f'<td class="{_kind(cell)}">{html.escape(cell)}</td>' for cell in line) for line in lines]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _kind(cell: str) -> str:
    return "n" if cell[:1].isdigit() or cell[:2] in ("-", "-0") else "t"


def _image(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<p><img alt="" src="data:image/{kind.lower()};base64,{data}"></p>'
