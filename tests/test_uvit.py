"""The network: names, shapes, sizes, dtypes and training mode. Parity with other implementations is in test_parity.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unidiffuser.uvit import UViT, UViTConfig, default_attention, timestep_embedding

SIZES = {
    "img_size": 8, "in_chans": 4, "patch_size": 2, "embed_dim": 32, "depth": 5, "num_heads": 4,
    "text_dim": 6, "num_text_tokens": 5, "clip_img_dim": 7,
}  # fmt: skip


def make(data_types: int = 2, **options) -> UViT:
    torch.manual_seed(0)
    return UViT(UViTConfig(**SIZES, data_types=data_types), **options)


def inputs(batch: int = 2, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, height, width), (batch, 1, 7), (batch, 5, 6)
    streams = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    return [*streams, torch.linspace(3, 1000, batch), torch.linspace(0, 499.5, batch)]


def test_parameter_names_are_the_published_ones():
    def block(prefix: str, skip: bool) -> set[str]:
        names = {"attn.qkv.weight"}
        for layer in ["norm2", "attn.proj", "norm3", "mlp.fc1", "mlp.fc2", *(["norm1", "skip_linear"] if skip else [])]:
            names |= {f"{layer}.weight", f"{layer}.bias"}
        return {f"{prefix}.{name}" for name in names}

    v0 = {"pos_embed"}
    for layer in ("patch_embed.proj", "norm", "decoder_pred", "text_embed", "text_out", "clip_img_embed", "clip_img_out"):
        v0 |= {f"{layer}.weight", f"{layer}.bias"}
    v0 |= block("mid_block", False)
    for i in range(2):
        v0 |= block(f"in_blocks.{i}", False) | block(f"out_blocks.{i}", True)
    assert set(make(0).state_dict()) == v0
    assert set(make(2).state_dict()) == v0 | {"token_embedding.weight", "pos_embed_token"}


def test_published_sizes_give_952_million_parameters_and_1105_tokens():
    net = UViT(UViTConfig(), device="meta")
    assert sum(p.numel() for p in net.parameters()) // 10**6 == 952
    assert net.position_embedding((32, 32)).shape == (1, 1105, 1536)


@pytest.mark.parametrize("data_types", [0, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (2, 6), (10, 4)])
def test_predictions_have_the_shape_of_their_inputs(data_types, height, width):
    given = inputs(2, height, width)
    for value, predicted in zip(given, make(data_types)(*given), strict=False):
        assert predicted.shape == value.shape
        assert predicted.isfinite().all()


def test_patches_of_a_picture_that_is_not_square_stay_in_place():
    """With blocks that pass through and heads that undo the embedding, each patch must come out where it went in."""
    net = make()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        for norm in ("norm1", "norm2", "norm3"):
            setattr(block, norm, nn.Identity())
        if hasattr(block, "skip_linear"):
            block.skip_linear.weight.data = torch.eye(32, 64)
    net.norm = nn.Identity()
    net.patch_embed.proj.weight.data = torch.eye(16, 16).reshape(16, 4, 2, 2).repeat(2, 1, 1, 1) * torch.tensor(
        [1.0] * 16 + [0.0] * 16).reshape(32, 1, 1, 1)  # fmt: skip
    order = torch.arange(16).reshape(4, 2, 2).permute(1, 2, 0).flatten()  # the head writes (p, p, C), the conv reads (C, p, p)
    net.decoder_pred.weight.data = torch.eye(32)[order]
    given = inputs(1, 6, 10)
    torch.testing.assert_close(net(*given)[0], given[0])


def test_only_the_heads_asked_for_are_computed():
    net, given = make(), inputs()
    everything = net(*given)
    called = []
    for name in ("decoder_pred", "clip_img_out", "text_out"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    img, clip_img, text = net(*given, heads=("text",))
    assert (img, clip_img) == (None, None)
    torch.testing.assert_close(text, everything[2])
    assert called == ["text_out"]


def test_the_data_type_token_tells_curated_from_web():
    net, given = make(), inputs()
    default, curated, web = (net(*given, kind)[0] for kind in (None, 1, torch.tensor([0, 0])))
    assert torch.equal(default, curated)
    assert not torch.allclose(curated, web)
    v0 = make(0)
    assert torch.equal(v0(*given)[0], v0(*given, 1)[0])


def test_labels_may_be_one_number_or_fractions():
    net, given = make(), inputs()
    one, many = net(*given[:3], 12.25, 7), net(*given[:3], torch.full((2,), 12.25), torch.full((2,), 7))
    torch.testing.assert_close(one, many)
    assert not torch.allclose(one[0], net(*given[:3], 12, 7)[0])


def test_time_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0.0, 2.5]), 8)
    angles = [2.5 * 10000 ** (-k / 4) for k in range(4)]
    expected = [[1.0] * 4 + [0.0] * 4, [math.cos(a) for a in angles] + [math.sin(a) for a in angles]]
    torch.testing.assert_close(embedding, torch.tensor(expected))


def test_position_embedding_is_resampled_for_other_sizes_only():
    net = make()
    own = net.position_embedding((4, 4))
    assert torch.equal(own[:, 3:], net.pos_embed[:, 2:])
    assert torch.equal(own[:, 2:3], net.pos_embed_token)
    other = net.position_embedding((3, 6))
    assert torch.equal(other[:, :9], own[:, :9])
    grid = net.pos_embed[:, 8:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (3, 6), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 18, 32)
    torch.testing.assert_close(other[:, 9:], expected)


def test_a_host_may_keep_the_position_tables_elsewhere():
    class Host(UViT):
        def __init__(self, config: UViTConfig):
            super().__init__(config)
            self.leaf = nn.Module()
            self.leaf.pos_embed, self.leaf.pos_embed_token = self.pos_embed, self.pos_embed_token
            del self.pos_embed, self.pos_embed_token

        def position_tables(self):
            return self.leaf.pos_embed, self.leaf.pos_embed_token

    torch.manual_seed(0)
    host, given = Host(UViTConfig(**SIZES)), inputs()
    torch.testing.assert_close(host(*given), make()(*given))


def test_attention_and_operations_are_the_callers():
    calls = []

    def attention(q, k, v):
        calls.append(q.shape)
        return default_attention(q, k, v)

    class Operations:
        Linear, Conv2d, LayerNorm, Embedding = nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding

    ours, given = make(), inputs(height=4)
    theirs = UViT(UViTConfig(**SIZES), operations=Operations, attention=attention)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(*given), ours(*given))
    assert calls == [(2, 4, 3 + 5 + 1 + 8, 8)] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_computes_in_its_own_dtype(dtype):
    net = make().to(dtype)
    seen = set()
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        block.attn.attention = lambda q, k, v: seen.add(q.dtype) or default_attention(q, k, v)
    out = net(*inputs(width=12, dtype=dtype))
    assert {o.dtype for o in out} | seen == {dtype}
    for low, full in zip(out, make()(*inputs(width=12)), strict=True):
        torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)


def test_it_trains_under_autocast():
    net = make().train()
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    given, targets, losses = inputs(4), inputs(4)[:3], []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(*given)
            loss = sum(F.mse_loss(o.float(), t) for o, t in zip(out, targets, strict=True))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_initial_weights_are_the_authors():
    net = UViT(UViTConfig(**(SIZES | {"embed_dim": 128, "clip_img_dim": 64})))
    for weight in (net.mid_block.mlp.fc1.weight, net.decoder_pred.weight, net.pos_embed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not net.mid_block.mlp.fc1.bias.any()
    assert not net.pos_embed_token.any()
    assert not hasattr(net.mid_block.attn.qkv, "bias") or net.mid_block.attn.qkv.bias is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(2, 3, 8, 8)}, "img must be"),
        ({0: torch.zeros(2, 4, 8, 9)}, "multiples of 2"),
        ({0: torch.zeros(2, 4, 0, 8)}, "multiples of 2"),
        ({0: torch.zeros(4, 8, 8)}, "img must be"),
        ({1: torch.zeros(2, 7)}, "clip_img must be"),
        ({1: torch.zeros(3, 1, 7)}, "clip_img must be"),
        ({2: torch.zeros(2, 77, 6)}, "text must be"),
    ],
)
def test_impossible_shapes_are_named(change, words):
    given = dict(enumerate(inputs())) | change
    with pytest.raises(ValueError, match=words):
        make()(*given.values())


def test_impossible_sizes_and_options_are_named():
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        UViTConfig(**(SIZES | {"img_size": 9}))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        UViTConfig(**(SIZES | {"embed_dim": 30}))
    with pytest.raises(ValueError, match="data_type 2"):
        make()(*inputs(), 2)
    with pytest.raises(ValueError, match="Unknown heads"):
        make()(*inputs(), heads=("clip",))
