"""The benchmarks' own arithmetic; their times are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import CONFIG

import unidiffuser
from benchmarks import captions, gpu, memory, peers, published_size, report
from benchmarks.clock import in_turns, network_flops
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.checkpoints.config import V1
from unidiffuser.media.files import write_between
from unidiffuser.uvit import UViT

ROOT = Path(unidiffuser.__file__).parents[1]


def test_flops_of_the_published_network() -> None:
    """Two for each weight and token (952 M x 1105), and attention's 4 x L^2 x D in 31 blocks, within a percent or two."""
    expected = 2 * 952e6 * 1105 + 31 * 4 * 1105**2 * 1536
    assert network_flops(V1.uvit) == pytest.approx(expected, rel=0.03)
    assert network_flops(V1.uvit, 2) == 2 * network_flops(V1.uvit)


def test_both_sides_run_the_same_network() -> None:
    made = peers.plain_checkpoint(load_checkpoint("emoji"))
    mine = unidiffuser.UniDiffuser(made, "cpu", torch.float32)
    config, generator = made.config.uvit, torch.Generator().manual_seed(0)
    given = [torch.randn(2, *shape, generator=generator) for shape in config.item_shapes.values()]
    labels = [torch.tensor([900.0, 40.0]), torch.tensor([0.0, 700.0])]
    with torch.inference_mode():
        found = mine.net(*given, *labels)
        theirs = peers.network(mine)(*given, *labels, torch.ones(2, dtype=torch.long))
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    (picture,) = mine.text_to_image("a", steps=1)
    assert picture.size == (128, 128)  # the upsampler doubles the sides of the bundled model's
    assert peers.Peer(mine).text_to_image(["a"], 1, 3.0)[0].size == (128, 128)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    seconds = {"ours": 1.0, "ours float32": 2.0, "ours fast": 0.25, "diffusers float32": 5.0}
    times = {name: {"wall_s": value} for name, value in seconds.items()}
    machine = {"device": "CPU", "threads": 2, "torch": "2", "diffusers": "0.42", "clock": "wall_s"}
    found = {
        "model": "emoji",
        "machine": machine | {"peak_gflops": {"float32": 100}},
        "tasks": [{"task": "joint", "batch": 4, "steps": 20, "fewest": 6, "times": times}],
    }  # fmt: skip
    text = report.markdown(found)
    assert "| joint | 4 | 1.00 | 5.00 | 2.5 | 5.0 | 0.25 | 20.0 | 4.0 |\n" in text
    assert "distilled model (joint 6)" in text
    times["diffusers bfloat16"] = {"wall_s": 3.0}
    assert "| joint | 4 | 1.00 | 3.00 | 2.5 | 3.0 | 0.25 | 12.0 | 4.0 |\n" in report.markdown(found)
    own = {"exact": {"wall_s": 0.6}, "fast": {"wall_s": 0.1}}
    drawn = [{"task": "text to image", "batch": n, "fewest": 2, "times": times} for n in (1, 4)]
    said = report.sentence(found | {"tasks": drawn, "own": [{"task": "text to image", "batch": 1, "times": own}]})
    assert "takes 0.60 s, and 0.10 s with" in said
    assert (
        "of 1 and 4 pictures are 3.0 to 3.0 times as fast, and those in the 2 steps of a distilled model 12.0 to 12.0" in said
    )
    doc = tmp_path / "speed.md"
    doc.write_text(f"before\n{report.SPEED[0]}\nold\n{report.SPEED[1]}\nafter\n")
    write_between(doc, text, report.SPEED)
    write_between(doc, text, report.SPEED)
    assert doc.read_text() == f"before\n{report.SPEED[0]}\n\n{text}\n{report.SPEED[1]}\nafter\n"
    doc.write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers"):
        write_between(doc, text, report.SPEED)
    assert report.SENTENCE[0] in (ROOT / "README.md").read_text("utf-8")
    assert report.SPEED[0] in (ROOT / "docs/results/speed.md").read_text("utf-8")


def test_the_table_of_a_gpu() -> None:
    few = {"batch 1": 0.25, "batch 8": 1.0}
    found = {
        "ours_s": {"batch 1": 2.0, "batch 8": 8.0}, "fast_s": 1.0, "distilled_s": few, "float16_s": {"diffusers": 4.0},
        "memory_gb": 3.14, "memory_offloaded_gb": 2.0,
    } | {f"compile, {mode}": {"batch 1, s": 1.0, "distilled, s": 0.2} for mode in ("default", "reduce-overhead")}  # fmt: skip
    text = gpu.table(found)
    assert "| distilled, 4 steps | 0.250 | 1.000 | 8.0 |\n" in text
    assert "| diffusers | 4.000 |  | 0.5 |\n" in text
    assert "Device memory: 3.1 GB, offloaded 2.0 GB.\n" in text
    assert "memory" not in gpu.table(found | {"memory_gb": None})


def test_the_captions_compared_are_of_equal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from unidiffuser.checkpoints.config import CaptionConfig

    small = {"vocab_size": 90, "n_positions": 160, "n_embd": 48, "n_layer": 2, "n_head": 4}

    def config(**given: object) -> CaptionConfig:
        return CaptionConfig(gpt2=small, prefix_dim=48, hidden_dim=8, **given)

    monkeypatch.setattr(captions, "CaptionConfig", config)
    found = captions.measure(torch.device("cpu"), images=3)
    assert (found["equal"], found["compared"]) == (3, 3)


def test_peak_of_live_bytes_counts_what_is_alive_at_once() -> None:
    x = torch.empty(1000, device="meta")  # float32; inputs do not count

    def chain() -> torch.Tensor:
        y = x + 1
        y = y + 1  # two of 4000 bytes for a moment
        z = (y.double(), y[:500])  # 8000 bytes, and a view
        return z[0]

    assert memory.peak_bytes(chain) == 12000
    q = torch.empty(1, 1, 2048, 8, device="meta", dtype=torch.float16)
    assert memory.peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == q.numel() * 2


def test_memory_of_a_model_is_that_of_the_phase_that_needs_most() -> None:
    weights = {"clip_text": 1, "uvit": 10, "vae": 2, "clip_image": 1, "caption": 3}
    sizes = memory.Sizes(weights, network=4, encode=5, decode=9, captions=1)
    assert sizes.text_to_image() == 1 + 10 + 2 + 9
    assert sizes.text_to_image(offload=True) == 10 + 4
    assert sizes.image_to_text() == 1 + 2 + 10 + 4
    found = memory.sizes(CONFIG, 16, torch.float16).with_network_in(8)
    whole = memory.sizes(CONFIG, 16, torch.float32)
    assert found.weights["uvit"] * 4 == whole.weights["uvit"] == 4 * sum(p.numel() for p in UViT(CONFIG.uvit).parameters())
    assert found.weights["caption"] * 2 == pytest.approx(whole.weights["caption"])
    assert 0 < found.network < whole.network
    larger = memory.sizes(CONFIG, 32, torch.float32)
    assert 3.5 < larger.decode / whole.decode < 4.5


def test_random_checkpoints_are_equal_in_all_layouts(tmp_path: Path) -> None:
    own = load_checkpoint(published_size.write_random(tmp_path, "own", CONFIG))
    assert own.parts() == ("uvit", "vae", "clip_text", "clip_image", "caption")
    for layout in ("original", "diffusers"):
        other = load_checkpoint(published_size.write_random(tmp_path, layout, CONFIG))
        assert other.parts() == own.parts()
        assert other.config.uvit == own.config.uvit
        for part in own.parts():
            mine, theirs = own.state_dict(part), other.state_dict(part)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
