"""The image head for large patches: its prediction, its loss and its start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unidiffuser.checkpoints.config import ModelConfig
from unidiffuser.path import NoisePath
from unidiffuser.runtime.precision import fix_batches
from unidiffuser.samplers import sample
from unidiffuser.schedule import add_noise, alpha_sigma
from unidiffuser.small.detail import noise_of_output
from unidiffuser.small.network import PictureUViTConfig, build, config_of
from unidiffuser.streams import Streams, item_generators
from unidiffuser.training.objective import diffusion_loss
from unidiffuser.uvit import UViT

SIZES = {
    "img_size": 8, "in_chans": 4, "patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 4,
    "text_dim": 6, "num_text_tokens": 5, "clip_img_dim": 7,
}  # fmt: skip
HEAD = {"sigma_data": 0.3, "detail_width": 12, "detail_blocks": 2, "detail_features": 3}
INNER = HEAD | {"detail_inner": 10, "detail_inner_blocks": 2, "detail_told": 6}
labels_ = st.floats(1, 1000)
sigmas = st.floats(0.01, 50)


def make(**options) -> UViT:
    torch.manual_seed(0)
    return build(config_of({**SIZES, **options})).requires_grad_(False)


def inputs(batch: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 8, 8), (batch, 1, 7), (batch, 5, 6)
    streams = [torch.randn(shape, generator=g) for shape in shapes]
    return [*streams, torch.linspace(1, 1000, batch), torch.linspace(0, 1000, batch)]


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(labels_, sigmas)
def test_the_picture_is_part_latent_and_part_output(label, sigma_data):
    """The formula of the docstring, against the way back from the noise that comes out."""
    latent, output, labels = tensors(2, 4, 4, 4), tensors(2, 4, 4, 4, seed=1), torch.full((2,), label, dtype=torch.float64)
    alpha, sigma = alpha_sigma(labels[0])
    noise = noise_of_output(output, latent, labels, sigma_data)
    s, width = sigma / alpha, (sigma / alpha) ** 2 + sigma_data**2
    wanted = sigma_data**2 / width * latent / alpha + s / width.sqrt() * output
    torch.testing.assert_close((latent - sigma * noise) / alpha, wanted, rtol=1e-6, atol=1e-6 * float(s + 1))


def test_small_sigma_data_predicts_the_picture_one_the_velocity_and_large_the_noise():
    x0, eps = tensors(3, 4, 4, 4), tensors(3, 4, 4, 4, seed=1)
    labels = torch.tensor([300.0, 600.0, 900.0], dtype=torch.float64)
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in alpha_sigma(labels))
    latent = add_noise(x0, eps, labels)
    torch.testing.assert_close(noise_of_output(x0, latent, labels, 1e-6), eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noise_of_output(sigma * x0 - alpha * eps, latent, labels, 1.0), eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noise_of_output(-1e4 * eps, latent, labels, 1e4), eps, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [HEAD, INNER, {"sigma_data": 0.3}, {"detail_width": 8, "detail_blocks": 0, "detail_inner": 8}],
)
def test_every_kind_of_head_gives_noise_in_the_shape_of_its_input(options):
    net = make(**options)
    given = inputs()
    for value, predicted in zip(given, net(*given), strict=False):
        assert predicted.shape == value.shape
        assert predicted.isfinite().all()
    clean = net(*given[:3], 0.0, 500.0)[0]
    assert clean.isfinite().all()
    assert net(*given, heads=("text",))[0] is None


@pytest.mark.parametrize("options", [HEAD, INNER])
def test_convolutions_start_from_the_coarse_prediction_and_can_leave_it(options):
    net, given = make(**options), inputs()
    before = net(*given)[0]
    net.detail.conv_in.weight.data.mul_(5)
    assert torch.equal(net(*given)[0], before)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    diffusion_loss(net, Streams(*given[:3]), torch.Generator().manual_seed(0), velocity=True)["loss"].backward()
    assert net.detail.conv_out.weight.grad.abs().sum() > 0


def awake(net: UViT) -> UViT:
    """With weights where a new network has zeros, so that every part of the head matters."""
    g = torch.Generator().manual_seed(7)
    for parameter in net.detail.parameters():
        if not parameter.any():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return net


def test_the_inner_level_sees_further_and_the_time_token_conditions_all_blocks():
    net, given = awake(make(**INNER)), inputs(1)
    coarse, token = torch.zeros(1, 16 + 3, 16, 16), torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    latent = torch.zeros(1, 4, 32, 32)
    touched = latent.clone()
    touched[:, :, 0, 0] = 1
    reach = [
        (torch.nonzero((head(latent, coarse, token) - head(touched, coarse, token)).abs().sum((0, 1)) > 1e-7).max().item())
        for head in (awake(make(**HEAD)).detail, net.detail)
    ]
    assert reach[0] < 16 < reach[1]
    change = net.detail(latent, coarse, token) - net.detail(latent, coarse, -token)
    assert change.abs().max() > 1e-3
    # The label reaches the token, so even the same patches and latent are not the same picture.
    assert not torch.allclose(net(*given)[0], net(*given[:3], given[3] + 300, given[4])[0], atol=1e-3)


def test_the_loss_of_an_image_is_that_of_its_velocity():
    net, clean = make(**HEAD), Streams(*inputs()[:3])
    labels = {"img": torch.tensor([100, 500, 900]), "text": torch.tensor([0, 0, 0])}
    noise = clean.map(lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    got = diffusion_loss(net, clean, torch.Generator(), labels=labels, noise=noise, velocity=True)
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in alpha_sigma(labels["img"].float()))
    latent, clip_img = (add_noise(clean.need(n), noise.need(n), labels["img"].float()) for n in ("img", "clip_img"))
    eps = net(latent, clip_img, clean.text, labels["img"].float(), torch.zeros(3))[0]
    x0 = (latent - sigma * eps) / alpha
    error = (alpha * eps - sigma * x0) - (alpha * noise.img - sigma * clean.img)
    torch.testing.assert_close(got["img"], error.square().mean(), rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    net = awake(make(**INNER))
    together = sample(net, NoisePath.joint(3), streams=Streams(), generator=item_generators(3, 4))
    alone = sample(net, NoisePath.joint(3), streams=Streams(), generator=item_generators(3, 4)[2:3])
    torch.testing.assert_close(together.img[2:3], alone.img, rtol=1e-4, atol=1e-4)


def test_with_fixed_batches_the_output_is_the_same_bit_by_bit():
    net, given = awake(make(**INNER)).to(torch.bfloat16), [x.to(torch.bfloat16) for x in inputs(5)[:3]]
    fix_batches(net, 64)
    labels = torch.linspace(1, 1000, 5)
    whole = net(*given, labels, labels)[0]
    one = net(*(x[3:4] for x in given), labels[3:4], labels[3:4])[0]
    assert torch.equal(whole[3:4], one)


def test_published_configs_have_no_such_head_and_configs_with_one_are_kept():
    assert not [name for name in make().state_dict() if name.startswith("detail")]
    config = ModelConfig(uvit=config_of({**SIZES, **INNER}))
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_data": 0.0}, "above 0"),
        ({"sigma_data": float("nan")}, "above 0"),
        ({"detail_width": 8, "patch_size": 1}, "multiple of 2"),
        ({"detail_width": 8, "detail_inner": 8, "patch_size": 2}, "multiple of 4"),
        ({"detail_inner": 8}, "give it a detail_width"),
        ({"detail_told": 8}, "give it a detail_width"),
    ],
)
def test_impossible_heads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PictureUViTConfig(**SIZES | options)
