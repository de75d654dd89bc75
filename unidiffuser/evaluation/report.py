"""The report of an evaluation: tables in Markdown, and one HTML file with tables, curves and pictures inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation.needs import needed
from unidiffuser.evaluation.parts import Answers
from unidiffuser.media.images import contact_sheet, open_image

Rows = Sequence[Mapping[str, Any]]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}summary{cursor:pointer;font-weight:600}
code{background:#f4f4f4;padding:0 .2em}.note{color:#666;font-size:13px}"""


def judged_cells(rows: Rows) -> list[list[str]]:
    """Heading and lines of the judge's table, in per cent."""
    table = [["task", "split", "measure", "share (95 % interval)", "n", "judge's ceiling", "nearest training", "shuffled"]]
    for row in rows:
        share = f"{_percent(row['rate'])} ({_percent(row['low'])} to {_percent(row['high'])})"
        marks = [_percent(row.get(name)) for name in ("ceiling", "nearest", "shuffled")]
        table.append([row["task"], row["split"], row["measure"], share, str(row["total"]), *marks])
    return table


def measure_cells(rows: Rows) -> list[list[str]]:
    """Heading and lines of the other measures; "best" says whether high or low is good."""
    table = [["task", "split", "measure", "value", "seeds", "real", "best"]]
    for row in rows:
        value = number(row["value"])
        if "low" in row:
            value += f" ({number(row['low'])} to {number(row['high'])})"
        seeds = " ".join(number(v) for v in row["values"]) if len(row["values"]) > 1 else "1"
        table.append([row["task"], row["split"], row["measure"], value, seeds, number(row.get("real")), row["best"] or "-"])
    return table


def confusion_cells(tables: Mapping[str, Mapping[str, Sequence[int]]], styles: Sequence[str]) -> list[list[str]]:
    """How many pictures asked for in one style are seen in which."""
    lines = [[*key.split("/"), asked, *map(str, seen)] for key, table in tables.items() for asked, seen in table.items()]
    return [["task", "split", "style asked for", *(f"seen as {style}" for style in styles)], *lines]


def sweep_cells(points: Rows) -> list[list[str]]:
    names = list(points[0])
    return [names, *[[number(point[name]) for name in names] for point in points]]


def timing_cells(rows: Rows) -> list[list[str]]:
    return [["task", "seconds an item (median)", "items"], *[[r["task"], number(r["seconds"]), str(r["items"])] for r in rows]]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table of heading and lines."""
    heading, *lines = cells
    marked = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in marked) + "\n"


def markdown_report(report: Mapping[str, Any]) -> str:
    """All tables, each under its heading; without the timing, which no two runs share."""
    return "\n".join(f"## {title}\n\n{markdown(cells)}" for title, cells in tables(report) if title != "Timing")


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Title and cells of each table that has lines."""
    found = [("Judged", judged_cells(report["judged"])), ("Measured", measure_cells(report["measures"]))]
    found.append(("Styles", confusion_cells(report["style_confusion"], report["styles"])))
    found += [(f"{option.capitalize()} sweep", sweep_cells(points)) for option, points in report["sweeps"].items()]
    found.append(("Timing", timing_cells(report["timing"])))
    return [(title, cells) for title, cells in found if len(cells) > 1]


def html_report(
    report: Mapping[str, Any], runs: Mapping[tuple[str, str], Sequence[Answers]], chosen: Mapping[str, Sequence[Pair]]
) -> str:
    """One self-contained page.

    Args:
        report: what ``scores.json`` holds.
        runs: (task, split) -> answers of each seed; the first seed's pictures are shown.
        chosen: split -> the pairs that were asked for.

    Raises:
        ValueError: curves are asked for and matplotlib is missing.
    """
    config = report["config"]
    body = [f"<h1>Evaluation of {html.escape(str(config['model']))}</h1>"]
    eyes = ", ".join(f"{name} <code>{html.escape(str(value)[:40])}</code>" for name, value in report["eyes"].items() if value)
    body.append(f"<p>Seen by: {eyes}. Seeds {', '.join(map(str, config['seeds']))}.</p>")
    for title, cells in tables(report):
        body.append(f"<h2>{title}</h2>{_html_table(cells)}")
        points = report["sweeps"].get(title.split()[0].lower())
        if points:
            body.append(_image(curves(points, title.split()[0].lower()), "PNG"))
    notes = sorted({row["note"] for row in report["measures"] if row.get("note")})
    body += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    body.append("<h2>Pictures</h2><p>The first of a fixed shuffle; nothing is chosen.</p>")
    for (task, split), answers in runs.items():
        sheet = grid(answers[0], chosen.get(split, []))
        if sheet is not None:
            body.append(f"<details open><summary>{task}, {split}</summary>{_image(sheet, 'JPEG')}</details>")
    settings = html.escape("\n".join(f"{key}: {value}" for key, value in config.items()))
    body.append(f"<h2>Settings</h2><pre>{settings}</pre>")
    head = f"<meta charset='utf-8'><title>Evaluation</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def grid(answers: Answers, pairs: Sequence[Pair]) -> Image.Image | None:
    """The pictures that were kept, over the captions made or asked for."""
    if not answers.shown:
        return None
    said = [item.get("caption") for item in answers.items[: len(answers.shown)]]
    under = [c if c is not None else (pairs[k].caption if k < len(pairs) else "") for k, c in enumerate(said)]
    return contact_sheet(answers.shown, under)


def curves(points: Rows, option: str) -> Image.Image:
    """What a sweep shows: each measure over the option's values and, with CLIP, FID over CLIP score, the paper's curve."""
    figure_module, canvas = needed("matplotlib.figure"), needed("matplotlib.backends.backend_agg")
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
    """Four figures, as short as they go; "-" for none."""
    return "-" if value is None else f"{value:.4g}"


def _percent(rate: float | None) -> str:
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
