"""Tables and plots from the JSON of a run, and the markers of the table in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPEED = "<!-- speed: python -m benchmarks -->", "<!-- /speed -->"  # in docs/results/speed.md
SENTENCE = "<!-- speed: python -m benchmarks --readme README.md -->", "<!-- /speed -->"


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
    clock, rows = found["machine"]["clock"], []
    for row in found["tasks"]:
        seconds = {name: times[clock] for name, times in row["times"].items()}
        theirs = min(value for name, value in seconds.items() if name.startswith("diffusers"))
        exact = seconds["diffusers float32"] / seconds["ours float32"]
        cells = [f"{seconds['ours']:.2f}", f"{theirs:.2f}", f"{exact:.1f}", f"{theirs / seconds['ours']:.1f}"]
        fast = seconds["ours fast"]
        cells += [f"{fast:.2f}", f"{theirs / fast:.1f}", f"{seconds['ours'] / fast:.1f}"]
        rows.append([row["task"], str(row["batch"]), *cells])
    fewest = ", ".join({f"{row['task']} {row['fewest']}": None for row in found["tasks"]})
    head = ["task", "batch", "ours, s", "diffusers, s", "float32 against float32", "best against best"]
    head += ["fast, s", "against diffusers", "against ours"]
    return (
        f"One network of the published kind at the sizes of {found['model']}, the same weights on both sides, "
        f"{found['tasks'][0]['steps']} guided steps, each side in its fastest format where none is named; fast: unguided "
        f"steps of a distilled model ({fewest}):\n\n" + _table(head, rows)
    )


def sentence(found: Mapping[str, Any]) -> str:
    """What the parts "tasks" and "own" say of pictures of a prompt, for the README."""
    clock, machine = found["machine"]["clock"], found["machine"]
    rows = [row for row in found["tasks"] if row["task"] == "text to image"]
    seconds = [{name: times[clock] for name, times in row["times"].items()} for row in rows]
    theirs = [min(value for name, value in row.items() if name.startswith("diffusers")) for row in seconds]
    batches = f"{', '.join(str(row['batch']) for row in rows[:-1])} and {rows[-1]['batch']}"

    def ratios(mine: str) -> str:
        low, *_, high = sorted(other / row[mine] for other, row in zip(theirs, seconds, strict=True))
        return f"{low:.1f} to {high:.1f}"

    (one,) = (row["times"] for row in found["own"] if (row["task"], row["batch"]) == ("text to image", 1))
    return (
        f"On {machine['threads']} cores of a CPU a picture of `{found['model']}` takes {one['exact'][clock]:.2f} s, and "
        f"{one['fast'][clock]:.2f} s with `--preset fast`. Beside diffusers' pipeline on one and the same network, exact runs "
        f"of {batches} pictures are {ratios('ours')} times as fast, and those in the {rows[0]['fewest']} steps of a distilled "
        f"model {ratios('ours fast')} times.\n"
    )


def _own(found: Mapping[str, Any]) -> str:
    clock, rows = found["machine"]["clock"], []
    for row in found["own"]:
        seconds = {name: times[clock] for name, times in row["times"].items()}
        cells = [f"{seconds['exact']:.2f}", f"{seconds['fast']:.2f}", f"{seconds['exact'] / seconds['fast']:.1f}"]
        parts = row["parts"]["fast"]
        rest = seconds["fast"] - sum(parts.values())
        share = {**parts, "rest": max(rest, 0.0)}
        whole = sum(share.values())
        cells.append(", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in share.items()))
        rows.append([row["task"], str(row["batch"]), *cells])
    head = ["task", "batch", "exact, s", "fast, s", "ratio", "where the time of fast goes"]
    return f"{found['model']} itself, exact in the steps that it suggests for each task:\n\n" + _table(head, rows)


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
    rows = []
    for row in found["costs"]:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["parts"].items())
        rows.append([row["what"], f"{row['seconds']:.1f}", parts, f"{row['rss_mb']:.0f}"])
    head = ["first", "s", "of which", "peak RSS, MB"]
    return f"A fresh process, {found['model']}, the imports among it:\n\n" + _table(head, rows)


def _profile(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found["profile"].items():
        fractions = row["fractions"].items()
        kinds = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in fractions if part >= 0.01)
        rows.append([name, f"{1000 * row['s']:.1f}", f"{100 * row['peak']:.0f} %" if "peak" in row else "-", kinds])
    return "Where the time goes:\n\n" + _table(["what", "ms", "of the matrix peak", "operators"], rows)


TABLES = {"tasks": _tasks, "own": _own, "full": _full, "captions": _captions, "costs": _costs, "profile": _profile}


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
