"""The benchmarks' own arithmetic; their times are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unidiffuser
from benchmarks import captions, report
from benchmarks.clock import in_turns, network_flops
from unidiffuser.checkpoints.config import V1
from unidiffuser.media.files import write_between

ROOT = Path(unidiffuser.__file__).parents[1]


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
    doc = tmp_path / "speed.md"
    doc.write_text(f"before\n{report.SPEED[0]}\nold\n{report.SPEED[1]}\nafter\n")
    write_between(doc, text, report.SPEED)
    write_between(doc, text, report.SPEED)
    assert doc.read_text() == f"before\n{report.SPEED[0]}\n\n{text}\n{report.SPEED[1]}\nafter\n"
    doc.write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_between(doc, text, report.SPEED)
    assert report.SPEED[0] in (ROOT / "docs/results/speed.md").read_text("utf-8")


def test_the_captions_compared_are_of_equal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from unidiffuser.checkpoints.config import CaptionConfig

    small = {"vocab_size": 90, "n_positions": 160, "n_embd": 48, "n_layer": 2, "n_head": 4}

    def config(**given: object) -> CaptionConfig:
        return CaptionConfig(gpt2=small, prefix_dim=48, hidden_dim=8, **given)

    monkeypatch.setattr(captions, "CaptionConfig", config)
    found = captions.measure(torch.device("cpu"), images=3)
    assert (found["equal"], found["compared"]) == (3, 3)
