"""The benchmarks' own arithmetic; their times are nobody's test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_pictures import labelled_folder

import unidiffuser
from benchmarks import captions, claims, one_fits_all, report
from benchmarks.clock import in_turns, network_flops
from benchmarks.quality import compare, counted, table
from unidiffuser.checkpoints.config import V1
from unidiffuser.emoji.judge import Judge, load_judge
from unidiffuser.evaluation.sources import read_folder

ROOT = Path(unidiffuser.__file__).parents[1]
EXAMPLE = ROOT / "unidiffuser/assets/example.png"


def test_flops_of_the_published_network() -> None:
    """Two for each weight and token (952 M x 1105), and attention's 4 x L^2 x D in 31 blocks, within a percent or two."""
    expected = 2 * 952e6 * 1105 + 31 * 4 * 1105**2 * 1536
    assert network_flops(V1.uvit) == pytest.approx(expected, rel=0.03)
    assert network_flops(V1.uvit, 2) == 2 * network_flops(V1.uvit)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}


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


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    times = {"ours": {"wall_s": 1.0}, "ours float32": {"wall_s": 2.0}, "diffusers float32": {"wall_s": 5.0}}
    machine = {"device": "CPU", "threads": 2, "torch": "2", "diffusers": "0.42", "clock": "wall_s"}
    found = {
        "model": "emoji",
        "machine": machine | {"peak_gflops": {"float32": 100}},
        "tasks": [{"task": "joint", "batch": 4, "steps": 20, "times": times}],
    }  # fmt: skip
    text = report.markdown(found)
    assert "| joint | 4 | 1.00 | 5.0 |\n" in text
    times["diffusers bfloat16"] = {"wall_s": 3.0}
    assert "| joint | 4 | 1.00 | 5.0 | 3.0 | 2.5 |\n" in report.markdown(found)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.SPEED[0]}\nold\n{report.SPEED[1]}\nafter\n")
    report.write_into(readme, text)
    report.write_into(readme, text)
    assert readme.read_text() == f"before\n{report.SPEED[0]}\n\n{text}\n{report.SPEED[1]}\nafter\n"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers"):
        report.write_into(readme, text)
    assert report.SPEED[0] in (ROOT / "README.md").read_text("utf-8")
    assert report.QUALITY[0] in (ROOT / "docs" / "speed.md").read_text("utf-8")


def test_the_captions_compared_are_of_equal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from unidiffuser.checkpoints.config import CaptionConfig

    small = {"vocab_size": 90, "n_positions": 160, "n_embd": 48, "n_layer": 2, "n_head": 4}

    def config(**given: object) -> CaptionConfig:
        return CaptionConfig(gpt2=small, prefix_dim=48, hidden_dim=8, **given)

    monkeypatch.setattr(captions, "CaptionConfig", config)
    found = captions.measure(torch.device("cpu"), images=3)
    assert (found["equal"], found["compared"]) == (3, 3)


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
    monkeypatch.setattr(one_fits_all, "SPLITS", {"trained": ("train", 3), "held out": ("heldout", 2)})
    judge = Judge(sorted({row["label"] for row in rows}), ["noto", "twemoji", "flat", "fluent"], (8, 8, 8, 8))
    monkeypatch.setattr(one_fits_all, "load_judge", lambda: judge)
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--pairs", "16", "--seeds", "0", "--optimizer", "adamw"]
    given += ["--concepts", "4"]
    monkeypatch.setattr("sys.argv", ["one_fits_all", *given, "--doc", str(doc)])
    one_fits_all.main()
    shown = json.loads((tmp_path / "out/joint/config.json").read_text("utf-8"))["options"]["where"]["label"]
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
