"""Tables and plots from the JSON of a run, and the markers of the table in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPEED = "<!-- speed: python -m benchmarks -->", "<!-- /speed -->"  # in docs/results/speed.md


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of a run."""
    parts = [_machine(found["machine"])]
    parts += [table(found) for name, table in TABLES.items() if found.get(name)]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _ratio(times: Mapping[str, Any], mine: str, other: str, clock: str) -> str:
    if other not in times:
        return "-"
    return f"{times[other][clock] / times[mine][clock]:.1f}"


def _machine(machine: Mapping[str, Any]) -> str:
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in machine["peak_gflops"].items())
    return (
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, diffusers {machine['diffusers']}; "
        f"matrix peak measured in GFLOP/s: {peaks}. Ratios above 1: ours is faster, by {_CLOCKS[machine['clock']]}.\n"
    )


_CLOCKS = {"wall_s": "the clock", "processor_s": "processor time, since the machine had other work"}


def _tasks(found: Mapping[str, Any]) -> str:
    clock = found["machine"]["clock"]
    half = next((n for n in found["tasks"][0]["times"] if n.startswith("diffusers ") and n != "diffusers float32"), "")
    ratios = [("ours", "diffusers float32", "against diffusers float32")]
    if half:  # else ours is float32 too
        ratios += [("ours", half, f"against {half}"), ("ours float32", "diffusers float32", "float32 against float32")]
    rows = []
    for row in found["tasks"]:
        t = row["times"]
        cells = [_ratio(t, mine, other, clock) for mine, other, _ in ratios]
        rows.append([row["task"], str(row["batch"]), f"{t['ours'][clock]:.2f}", *cells])
    head = ["task", "batch", "ours, s", *(title for *_, title in ratios)]
    return f"{found['model']}, {found['tasks'][0]['steps']} steps, guidance on:\n\n" + _table(head, rows)


def _full(found: Mapping[str, Any]) -> str:
    clock, full = found["machine"]["clock"], found["full"]
    rows = []
    half = full["dtype"] != "float32"
    for name, times in full["times"].items():
        if name == "ours" and not half:
            continue  # the same again
        dtype = full["dtype"] if name == "ours" else "float32"
        speed = 1000 * full["tflop"] / times[clock]  # GFLOP/s; by processor time those of one thread, as the peak's
        fraction = f"{100 * speed / full['peak_gflops'][dtype]:.0f} %"
        label = f"ours {dtype}" if name == "ours" else name
        ratio = _ratio(full["times"], name, "diffusers float32", clock)
        rows.append([label, f"{times[clock]:.2f}", ratio, fraction])
    head = ["one guided step", "s", "against diffusers float32", "of the matrix peak"]
    size = f"Published size (952 M, random weights), 512 px, two evaluations, {full['tflop']:.2f} TFLOP"
    text = f"{size}:\n\n{_table(head, rows)}"
    if half:
        deviations = ", ".join(f"{name} {100 * value:.2g} %" for name, value in full["deviations"].items())
        text += f"\nDeviation of {full['dtype']} from float32 in it (norms): {deviations}.\n"
    return text


def _captions(found: Mapping[str, Any]) -> str:
    clock, row = found["machine"]["clock"], found["captions"]
    times = row["times"]
    head = ["captions", "ours, s", "diffusers, s", "ratio", "equal, token for token"]
    cells = [str(row["images"]), f"{times['ours'][clock]:.1f}", f"{times['diffusers'][clock]:.1f}"]
    cells += [_ratio(times, "ours", "diffusers", clock), f"{row['equal']} of {row['compared']} compared"]
    return "Caption decoder alone (GPT-2 small, 5 beams, 67 tokens, float32):\n\n" + _table(head, [cells])


def _costs(found: Mapping[str, Any]) -> str:
    rows = [[row["what"], f"{row['seconds']:.2f}", f"{row['rss_mb']:.0f}"] for row in found["costs"]]
    return f"A fresh process, {found['model']}:\n\n" + _table(["until", "s", "peak RSS, MB"], rows)


def _profile(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found["profile"].items():
        fractions = row["fractions"].items()
        kinds = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in fractions if part >= 0.01)
        rows.append([name, f"{1000 * row['s']:.1f}", f"{100 * row['peak']:.0f} %" if "peak" in row else "-", kinds])
    return "Where the time goes:\n\n" + _table(["what", "ms", "of the matrix peak", "operators"], rows)


TABLES = {"tasks": _tasks, "full": _full, "captions": _captions, "costs": _costs, "profile": _profile}


def plot_scaling(rows: Sequence[Mapping[str, Any]], clock: str, path: Path) -> None:
    """Time over batch, steps and pixels, one panel each, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {"batch": "pictures at once", "steps": "steps", "size": "pixels of one picture"}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (axis, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        points = sorted((row["value"], row["times"][clock]) for row in rows if row["axis"] == axis)
        axes.loglog(*zip(*points, strict=True), "o-", base=2)
        axes.loglog([p[0] for p in points], [points[0][1] * p[0] / points[0][0] for p in points], ":", color="gray", base=2)
        axes.set_xlabel(title)
        axes.set_xticks([p[0] for p in points])
        labels = [f"{p[0]}" for p in points]
        if axis == "size":
            known = {
                row["value"]: f"{row['options']['width']}x{row['options']['height']}" for row in rows if row["axis"] == axis
            }
            labels = [known[p[0]] for p in points]
        axes.set_xticklabels(labels, rotation=30)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds (dotted: in proportion)")
    FigureCanvasAgg(figure).print_png(path)
