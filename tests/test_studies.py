"""The studies of the bundled model: their arithmetic, and that each runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_pictures import labelled_folder

import unidiffuser
from unidiffuser.emoji.judge import Judge, load_judge
from unidiffuser.emoji.studies import claims, few_steps, one_fits_all
from unidiffuser.emoji.studies.quality import compare, counted, table
from unidiffuser.emoji.studies.report import CAPTION_QUALITY, FEW_STEPS, QUALITY
from unidiffuser.evaluation.sources import read_folder

ROOT = Path(unidiffuser.__file__).parents[1]
EXAMPLE = ROOT / "unidiffuser/assets/example.png"


def test_evaluations_are_counted(tiny_checkpoint: Path) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    blocks = model.config.uvit.depth // 2 * 2 + 1
    with counted(model.net) as rows:
        model.text_to_image("a", count=3, steps=2, guidance=2.0)
    assert rows[0] == 3 * 2 * 2 * blocks
    model.text_to_image("a", steps=1)
    assert rows[0] == 3 * 2 * 2 * blocks


def test_loss_is_paired() -> None:
    exact = {"concept": [1, 1, 1, 0], "style": [1, 0, 1, 0], "evaluations": 40, "wall_s": 2.0, "processor_s": 2.0}
    half = {"concept": [1, 1, 0, 0], "style": [1, 1, 1, 0], "evaluations": 20, "wall_s": 1.0, "processor_s": 1.0}
    row = compare({"exact/0": exact, "half/0": half}, "half", [0])
    assert (row["concept"], row["concept_loss"], row["style_loss"], row["n"]) == (50.0, 25.0, -25.0, 4)
    assert row["concept_error"] == pytest.approx(100 * 1.96 * (0.75 / 3 / 4) ** 0.5)
    assert "| half | 20.0 | 50.0 | +25.0 ± 49.0 |" in table([row])


@pytest.mark.parametrize("task", few_steps.TASKS)
def test_few_steps_of_each_task(task: str, tmp_path: Path) -> None:
    pairs = list(read_folder(labelled_folder(tmp_path)))[:3]
    model, judge = unidiffuser.load("emoji", device="cpu"), load_judge()
    split = {"seen": pairs, "heldout": pairs}
    exact = few_steps.measure(model, judge, few_steps.TASKS[task], split, {"steps": 2}, 5)
    few = few_steps.measure(model, judge, few_steps.TASKS[task], split, {"steps": 2, "guidance": 1}, 5)
    assert len(few["concept"]) == len(few["style"]) == 5
    if task == "inversions":  # without guidance in any case
        assert exact["evaluations"] == few["evaluations"] >= 1
    else:
        assert exact["evaluations"] > few["evaluations"] >= 1
    row = few_steps.compare(few, exact)
    assert row["concept_loss"] == pytest.approx(100 * (sum(exact["concept"]) - sum(few["concept"])) / 5)
    found = {task: {"exact": few_steps.compare(exact, exact), "fast, 2 steps": row}}
    assert f"| {task} | fast, 2 steps | {few['evaluations']:.0f} |" in few_steps.table(found)
    few_steps.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
    assert FEW_STEPS[0] in (ROOT / "docs/results/few-steps.md").read_text("utf-8")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> claims.Bench:
    """The bundled model before six pictures that it does not know; two steps, so that only the wiring is looked at."""
    folder = tmp_path_factory.mktemp("claims")
    pairs = list(read_folder(labelled_folder(folder)))
    model = unidiffuser.load("emoji", device="cpu")
    return claims.Bench(model, load_judge(), pairs[:6], pairs[6:9], {"steps": 2, "guidance": 2.0}, folder)


@pytest.mark.parametrize("name", ["guidance", "no style", "variation", "noisy condition", "rewriting"])
def test_claims(bench: claims.Bench, name: str) -> None:
    rows = claims.CLAIMS[name](bench)
    assert rows
    assert all(len(row) == 3 for row in rows)
    assert name in claims.table({name: rows})
    assert name == "rewriting" or (bench.out / f"{name.replace(' ', '-')}.jpg").is_file()


def test_rewriting_keeps_the_label(bench: claims.Bench) -> None:
    """The label of a caption with a wrong style stays."""
    lions = [
        replace(pair, path=EXAMPLE, captions=(f"lion, {pair.style}",), fields={**pair.fields, "label": "lion"})
        for pair in bench.trained
    ]
    kept = {row[0]: row[2] for row in claims.rewriting(replace(bench, trained=lions, options={"steps": 10, "guidance": 2.0}))}
    assert float(kept["label"].split(" ")[0]) > 80


@pytest.mark.slow
def test_one_network_is_compared_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two steps each, so that only the wiring is looked at: three trainings, their answers, the table, and nothing twice."""
    data = labelled_folder(tmp_path)
    rows = [json.loads(line) | {"known": True} for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    doc = tmp_path / "doc.md"
    doc.write_text("\n".join(one_fits_all.MARKERS), "utf-8")
    monkeypatch.setattr(one_fits_all, "BATCH", 8)
    monkeypatch.setattr(one_fits_all, "SHEET", 2)
    monkeypatch.setattr(one_fits_all, "SPLITS", {"trained": ("train", 3), "held out": ("heldout", 2)})
    judge = Judge(sorted({row["label"] for row in rows}), ["noto", "twemoji", "flat", "fluent"], (8, 8, 8, 8))
    monkeypatch.setattr(one_fits_all, "load_judge", lambda: judge)
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--pairs", "16", "--seeds", "0", "--optimizer", "adamw"]
    given += ["--concepts", "4"]
    monkeypatch.setattr("sys.argv", ["one_fits_all", *given, "--doc", str(doc)])
    one_fits_all.main()
    shown = json.loads((tmp_path / "out/joint/config.json").read_text("utf-8"))["options"]["labels"]
    assert len(set(shown)) == 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == [
        "one-fits-all-joint.jpg",
        "one-fits-all-text-to-image.jpg",
    ]
    lines = [line for line in doc.read_text("utf-8").splitlines() if line.startswith(("| text to", "| image to"))]
    assert len(lines) == 2 * 3  # concept, style and label, on trained and held-out pairs
    assert all("16 pairs" not in line and line.count("n = ") == 2 for line in lines)
    monkeypatch.setattr(one_fits_all, "train", None)
    monkeypatch.setattr(one_fits_all, "answers", None)
    one_fits_all.main()  # all of it is kept
    for other in (["--pairs", "24"], ["--concepts", "3"]):
        monkeypatch.setattr("sys.argv", ["one_fits_all", *given, *other])
        with pytest.raises(SystemExit):
            one_fits_all.main()
        assert "another --out" in capsys.readouterr().err


def test_distance_of_pictures() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    assert claims.distance(pixels + torch.tensor([0.5, 0.25])[:, None, None, None], pixels).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("markers", [QUALITY, CAPTION_QUALITY])
def test_the_document_has_the_markers(markers: tuple[str, str]) -> None:
    text = (ROOT / "docs/results/quality.md").read_text("utf-8")
    assert all(marker in text for marker in markers)
