"""What trades quality for time: that it is off unless asked for, computes what it says, and is exact where it must be."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import unidiffuser
from unidiffuser.checkpoints.checkpoint import Checkpoint
from unidiffuser.checkpoints.config import ModelConfig
from unidiffuser.options import resolve
from unidiffuser.path import NoisePath
from unidiffuser.runtime.acceleration import PRESETS, Compiled, DeepCache
from unidiffuser.samplers import Streams, sample
from unidiffuser.uvit import UViT, UViTConfig

SIZES = UViTConfig(
    img_size=8, in_chans=4, patch_size=2, embed_dim=32, depth=7, num_heads=4, text_dim=6, num_text_tokens=5, clip_img_dim=7
)
BLOCKS = 7


def make() -> UViT:
    torch.manual_seed(0)
    net = UViT(SIZES).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # large enough that the predictions depend on the inputs
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def count_blocks(net: UViT) -> list[int]:
    """Rows that went through each block, in the order of the calls."""
    rows: list[int] = []
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        block.register_forward_hook(lambda _, given, out: rows.append(len(out)))
    return rows


def run(net: torch.nn.Module, steps: int = 6, path: NoisePath | None = None, **options) -> Streams:
    start = torch.Generator().manual_seed(3)
    text = torch.randn(2, 5, 6, generator=start)
    path = path or NoisePath.text_to_image(steps)
    streams = Streams(text=text) if path.t_text[0] == 0 else Streams()
    return sample(net, path, streams, guidance=3.0, generator=[torch.Generator().manual_seed(k) for k in (1, 2)], **options)


def equal(a: Streams, b: Streams) -> bool:
    return all(torch.equal(x, b.need(name)) for name, x in a.items())


@pytest.mark.parametrize("branch", [1, 2, 3])
def test_an_interval_of_one_changes_nothing(branch: int) -> None:
    net = make()
    assert equal(run(DeepCache(net, 1, branch)), run(net))


@pytest.mark.parametrize(("interval", "branch"), [(2, 1), (3, 1), (2, 2), (4, 3)])
def test_cached_calls_run_the_outer_blocks_only(interval: int, branch: int) -> None:
    net = make()
    rows = count_blocks(net)
    run(DeepCache(net, interval, branch), steps=6)
    full = -(-6 // interval)
    assert len(rows) == full * BLOCKS + (6 - full) * 2 * branch
    assert set(rows) == {4}  # two items, two branches of guidance in one forward


def test_a_cached_call_sees_its_own_labels_and_inputs() -> None:
    net, cached = make(), DeepCache(make(), 2)
    given = [torch.randn(1, *shape) for shape in SIZES.item_shapes.values()]
    labels = torch.tensor([500.0]), torch.tensor([0.0])
    first = cached(*given, *labels)
    again = cached(*given, *labels)
    assert torch.allclose(again[0], first[0])  # the same inputs: what is kept is what would be computed
    cached(*given, *labels)
    moved = cached(given[0] + 1, *given[1:], *labels)
    exact = net(given[0] + 1, *given[1:], *labels)
    assert not torch.allclose(moved[0], first[0])
    assert not torch.allclose(moved[0], exact[0])


def test_other_evaluations_than_those_kept_are_computed() -> None:
    """Guidance that ends on the way shrinks the batch, which the kept rows cover; guidance that begins does not."""
    net = make()
    rows = count_blocks(net)
    run(DeepCache(net, 100), steps=4, guidance_interval=(600.0, 1000.0))  # labels 1000, 750, then 500, 250
    assert rows == [4] * BLOCKS + [4] * 2 + [2] * 2 + [2] * 2
    rows.clear()
    run(DeepCache(net, 100), steps=4, guidance_interval=(0.0, 600.0))
    assert rows == [2] * BLOCKS + [2] * 2 + [4] * BLOCKS + [4] * 2


def test_numbers_out_of_range() -> None:
    net = make()
    with pytest.raises(ValueError, match="cache_interval"):
        DeepCache(net, 0)
    with pytest.raises(ValueError, match="cache_branch must be between 1 and 3"):
        DeepCache(net, 2, 4)


def test_options_reach_the_sampler(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    rows = count_blocks(model.net)
    model.text_to_image("a", steps=4)
    full = sum(rows)
    blocks = len(rows) // 4
    rows.clear()
    model.text_to_image("a", steps=4, cache_interval=2)
    assert sum(rows) == full // 2 + 2 * 2 * 2  # two full guided steps, and two of two rows through the outer pair of blocks
    rows.clear()
    model.text_to_image("a", steps=4, guidance_interval=(600, 1000))
    assert sum(rows) == 2 * 2 * blocks + 2 * blocks
    seen = []
    original = NoisePath.text_to_image
    monkeypatch.setattr(NoisePath, "text_to_image", lambda *args, **kw: seen.append(kw) or original(*args, **kw))
    model.text_to_image("a", steps=4, spacing="karras")
    assert seen == [{"spacing": "karras"}]


def test_a_preset_fills_in_what_is_not_given() -> None:
    config = ModelConfig(defaults={"steps": 20, "guidance": 6.0})
    plan = resolve({"preset": "fast"}, config)
    assert (plan["steps"], plan["spacing"], plan["guidance"]) == (10, "logsnr", 5.0)
    assert resolve({"preset": "fast", "steps": 33}, config)["steps"] == 33
    assert resolve({"preset": "fast", "guidance": (2.0, 3.0)}, config)["guidance"] == (2.0, 3.0)
    assert PRESETS["fast"]({"steps": 1, "guidance": (1.0, 3.5)}) == {"steps": 1, "spacing": "logsnr", "guidance": (1.0, 3.0)}
    assert resolve({}, config) == resolve({"preset": "exact"}, config)
    for wrong in (
        {"preset": "furious"},
        {"spacing": "golden"},
        {"cache_branch": 16},
        {"cache_interval": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            resolve(wrong, config)


def test_parts_are_on_the_device_only_while_they_work(tiny_checkpoint: Path) -> None:
    """Without a second device at hand the moves themselves are watched."""
    kept = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32, offload=True)
    moves: list[str] = []

    class Device:
        """Stands for another device."""

        type = "far"

    model.device, elsewhere = Device(), model.device
    for name in ("net", "text_encoder", "autoencoder"):
        part = getattr(model, name)
        for module in [part] if isinstance(part, torch.nn.Module) else [v for v in vars(part).values() if hasattr(v, "to")]:
            module.to = lambda device, name=name: moves.append(f"{name} {'in' if isinstance(device, Device) else 'out'}")
    model.encode_texts(["a"])
    assert moves == ["text_encoder in"] * 2 + ["text_encoder out"] * 2  # CLIP, and the Linear
    moves.clear()
    plan = resolve({"steps": 2}, model.config)
    with pytest.raises(ValueError, match="missing"):
        model.run(NoisePath.image_to_text(2), Streams(), plan, [torch.Generator()])
    assert moves == ["net in", "net out"]  # and out again when something fails
    model.device = elsewhere
    pictures = [np.asarray(m.text_to_image("a", steps=2)[0]) for m in (kept, model)]
    assert np.array_equal(*pictures)


def test_the_caption_decoder_is_not_read_for_pictures(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    original = Checkpoint.state_dict

    def recorded(self: Checkpoint, part: str, prefix: str = "", *args, **kwargs):
        asked.append((part, prefix))
        return original(self, part, prefix, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "state_dict", recorded)
    unidiffuser.load(tiny_checkpoint, device="cpu").text_to_image("a", steps=1)
    assert {prefix for part, prefix in asked if part == "caption"} == {"encode_prefix."}
    assert "clip_image" not in {part for part, _ in asked}


def test_tiles_bound_the_work_of_the_autoencoder(tiny_checkpoint: Path) -> None:
    whole = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    tiled = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32, tiling=True)
    areas: list[int] = []
    tiled.autoencoder.vae.decoder.register_forward_hook(
        lambda _, given, out: areas.append(given[0].shape[2] * given[0].shape[3])
    )
    small, large = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 32, 24)
    assert torch.equal(tiled.autoencoder.decode(small), whole.autoencoder.decode(small))
    assert tiled.autoencoder.decode(large).shape == whole.autoencoder.decode(large).shape
    assert max(areas) <= 16 * 16


def test_compilation_falls_back_with_a_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(net: torch.nn.Module, mode: str):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler here\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net = make()
    with caplog.at_level(logging.WARNING):
        assert equal(run(Compiled(net)), run(net))
    assert [record.getMessage() for record in caplog.records] == ["torch.compile failed (no compiler here); running without it"]


def test_compilation_that_works_is_used(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda net, mode: modes.append(mode) or net)
    plain = unidiffuser.load(tiny_checkpoint, device="cpu").text_to_image("a", steps=2)[0]
    model = unidiffuser.load(tiny_checkpoint, device="cpu", compile="reduce-overhead")
    assert np.array_equal(model.text_to_image("a", steps=2)[0], plain)
    assert modes == ["reduce-overhead"]
    with pytest.raises(ValueError, match="compile must be one of"):
        unidiffuser.load(tiny_checkpoint, compile="fast")
