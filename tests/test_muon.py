"""Muon: the updates of torch's, and the short way to them on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiffuser.training.muon import Muon, _polar, _polar_by_gram


def test_muon_makes_torchs_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch.optim.Muon, which works in bf16 everywhere, for matrices of several shapes and over several steps."""
    reference = pytest.importorskip("torch.optim._muon", reason="this torch has no Muon").Muon
    monkeypatch.setattr("unidiffuser.training.muon._in_bf16", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (16, 16), (24, 8)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.01, weight_decay=0.1),
        reference(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0
        assert (mine - other).norm() < 0.01 * other.norm()  # bf16


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 24), more=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_the_gram_matrix_tells_all_that_newton_and_schulz_need(rows: int, more: int, seed: int) -> None:
    """Products of the small side alone give the same, also for singular values over three decades."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, rows, rows + more, generator=generator)
    wide *= torch.logspace(0, -3, rows)[:, None]
    wide /= wide.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(_polar_by_gram(wide), _polar(wide.double()).float(), atol=2e-3, rtol=2e-3)


def test_muon_is_for_matrices() -> None:
    with pytest.raises(ValueError, match=r"not for a tensor of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))])
