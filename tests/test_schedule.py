"""The schedule against diffusers' (one label lower there) and against its own inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiffuser import schedule

LABELS = st.floats(0, 1000)


def test_labels_are_one_above_the_timesteps_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    alpha, sigma = schedule.alpha_sigma(torch.arange(1, 1001))
    torch.testing.assert_close(alpha**2, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sigma**2, 1 - theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.alphas_cumprod().float(), theirs, atol=1e-6, rtol=1e-5)


def test_label_zero_is_exactly_clean():
    zero = torch.tensor(0.0)
    assert [float(v) for v in schedule.alpha_sigma(zero)] == [1.0, 0.0]
    assert float(schedule.half_logsnr(zero)) == float("inf")
    assert float(schedule.sigma_of_label(zero)) == 0.0
    x, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(schedule.add_noise(x, noise, 0), x)


@settings(deadline=None)
@given(LABELS)
def test_log_alpha_is_linear_between_labels(label: float):
    t = torch.tensor(label, dtype=torch.float64)
    low = torch.tensor(min(int(label), 999), dtype=torch.float64)
    ends = schedule.log_alpha(low), schedule.log_alpha(low + 1)
    assert float(schedule.log_alpha(t)) == pytest.approx(float(ends[0] + (t - low) * (ends[1] - ends[0])), abs=1e-12)


@settings(deadline=None)
@given(LABELS)
def test_signal_and_noise_share_one_circle(label: float):
    alpha, sigma = schedule.alpha_sigma(torch.tensor(label, dtype=torch.float64))
    assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-12)


@settings(deadline=None)
@given(LABELS)
def test_labels_survive_the_way_to_log_snr_and_sigma(label: float):
    t = torch.tensor([label], dtype=torch.float64)
    assert float(schedule.label_of_half_logsnr(schedule.half_logsnr(t))) == pytest.approx(label, abs=1e-6)
    assert float(schedule.label_of_sigma(schedule.sigma_of_label(t))) == pytest.approx(label, abs=1e-6)


def test_inverses_clamp_to_the_square():
    assert schedule.label_of_sigma(torch.tensor([0.0, 1e9])).tolist() == [0.0, 1000.0]


def test_add_noise_takes_one_label_per_item():
    x, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    labels = torch.tensor([0.0, 500.5, 1000.0])
    together = schedule.add_noise(x, noise, labels)
    for k, label in enumerate(labels.tolist()):
        torch.testing.assert_close(together[k], schedule.add_noise(x[k], noise[k], label))
