"""Number formats that nobody asked for, and batches that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unidiffuser
from unidiffuser.runtime import precision
from unidiffuser.runtime.precision import automatic_dtype, fix_batches, in_fixed_batches, multiplies_bf16
from unidiffuser.training import sharding
from unidiffuser.training.config import TrainConfig
from unidiffuser.uvit import UViT, UViTConfig

SIZES = UViTConfig(
    img_size=8, in_chans=4, patch_size=2, embed_dim=64, depth=3, num_heads=4, text_dim=6, num_text_tokens=5, clip_img_dim=7
)


@pytest.mark.parametrize("hardware", [False, True])
def test_a_cpu_gets_bf16_where_it_multiplies_it(hardware: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: hardware)
    model = unidiffuser.load(tiny_checkpoint, device="cpu")
    fast = torch.bfloat16 if hardware else torch.float32
    assert model.net.pos_embed.dtype == model.autoencoder.vae.dtype == fast
    assert model.text_encoder.clip.dtype == model.image_token_encoder.clip.dtype == torch.float32
    assert model.captioner.decode_prefix.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_asked_for_goes_before(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=dtype)
    parts = [model.net, model.autoencoder.vae, model.text_encoder.clip, model.text_encoder.encode_prefix, model.captioner]
    assert {next(part.parameters()).dtype for part in parts} == {dtype}


@pytest.mark.parametrize(
    ("capability", "answers", "expected"),
    [
        ("AVX512", {"_is_amx_tile_supported": True}, True),
        ("AVX512", {"_is_avx512_bf16_supported": True}, False),  # slower than fp32 where it was measured
        ("AVX2", {}, False),
    ],
)
def test_the_hardware_is_asked(capability: str, answers: dict, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: answers.get(name, False), raising=False)
    assert multiplies_bf16() is expected
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert multiplies_bf16() is False  # a torch that cannot tell
    assert automatic_dtype(torch.device("cuda")) == torch.float16


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30))
def test_fixed_batches_are_of_one_size_and_change_nothing(size: int, batch: int) -> None:
    sizes: list[int] = []

    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, None]:
        sizes.append(len(a))
        return a * b[:, None], None

    a, b = torch.randn(batch, 3), torch.randn(batch)
    product, nothing = in_fixed_batches(function, size, a, b)
    assert nothing is None
    assert torch.equal(product, a * b[:, None])
    assert set(sizes) == {size}
    assert len(sizes) == -(-batch // size)


class Fickle(torch.nn.Linear):
    """A layer whose results depend on the number of its items."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        return super().forward(x) * (1 if len(x) == 11 else 1.5)


seen: set[int] = set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4, 11, 13, 40])
def test_a_network_in_fixed_batches(batch: int, dtype: torch.dtype) -> None:
    """25 tokens an item and 256 rows: bit for bit the results of 11 items at a time, with a layer that needs them and others
    that do not."""
    torch.manual_seed(0)
    net = UViT(SIZES).eval().to(dtype)
    net.mid_block.mlp.fc2 = Fickle(256, 64, dtype=dtype)
    given = [torch.randn(44, *shape).to(dtype) for shape in SIZES.item_shapes.values()]
    given += [torch.linspace(1, 999, 44), torch.zeros(44), torch.arange(44) % 2]
    expected = [torch.cat(found)[:batch] for found in zip(*(net(*(x[i : i + 11] for x in given)) for i in range(0, 44, 11)))]  # noqa: B905
    fix_batches(net, 256)
    for _ in range(2):  # the second time it is known which layers need fixed batches
        seen.clear()
        found = net(*(x[:batch] for x in given))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert seen == {11}
    assert torch.equal(
        net(*(x[:batch] for x in given[:3]), 5.0, 0.0)[0], net(*(x[:batch] for x in given[:3]), 5.0, torch.zeros(batch))[0]
    )


def test_only_layers_that_need_it_are_padded() -> None:
    net = UViT(SIZES).eval()
    net.mid_block.mlp.fc2 = Fickle(256, 64)
    fix_batches(net, 256)
    given = [torch.randn(3, *shape) for shape in SIZES.item_shapes.values()]
    rows: dict[str, int] = {}
    net(*given, 5.0, 0.0)
    for name in ("fc1", "fc2"):
        getattr(net.mid_block.mlp, name).forward.plain = lambda x, n=name: (
            rows.update({n: len(x)}),
            x.new_zeros(*x.shape[:2], 256 if n == "fc1" else 64),
        )[1]
    net(*given, 5.0, 0.0)
    assert rows == {"fc1": 3, "fc2": 11}


@pytest.mark.parametrize("hardware", [True, False])
def test_training_is_in_bf16_where_the_device_multiplies_it(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "multiplies_bf16", lambda: hardware)
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for asked, expected in (("auto", hardware), ("bf16", True), ("no", False)):
        with sharding.autocast(layer, asked, torch.device("cpu")):
            assert (layer(x).dtype == torch.bfloat16) is expected
    assert sharding.in_bf16("auto", torch.device("cuda"))
    assert TrainConfig(stage="uvit", out="run").precision == "auto"


def test_in_bf16_an_item_is_bit_for_bit_the_item_alone(tiny_checkpoint: Path) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    together = model.joint(count=5, steps=3, seed=2)
    for k in (0, 3):
        picture, caption = model.joint(count=1, steps=3, seed=2 + k)[0]
        assert picture.tobytes() == together[k][0].tobytes()
        assert caption == together[k][1]
