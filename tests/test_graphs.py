"""Training steps as CUDA graphs: recorded where there is a GPU, and nothing else anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairs import TINY, latent_folder
from torch import nn

from unidiffuser.distributed import World
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.graphs import Graphed, recorded
from unidiffuser.training.latent_stage import LatentStage
from unidiffuser.training.loop import train

GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = 2 * self.layer(x if more is None else x + more)
        return out


def test_what_cannot_be_recorded_is_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Doubled()
    graphed = Graphed(model)
    monkeypatch.setattr(Graphed, "_record", lambda self, given: pytest.fail("recorded"))
    x = torch.randn(2, 3)
    assert torch.equal(graphed(x, None), model(x))
    with torch.no_grad():
        assert torch.equal(graphed(x), model(x))
    assert graphed.layer is model.layer
    assert not hasattr(graphed, "set_requires_gradient_sync")


def test_each_shape_is_recorded_once_and_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    model = Doubled()

    def record(self: Graphed, given: tuple[torch.Tensor, ...]) -> nn.Module:
        shapes.append(given[0].shape)
        return model

    monkeypatch.setattr(Graphed, "_record", record)
    graphed = Graphed(model)
    for size in (1, 2, 1, 3, 2, 4, 5, 6):
        assert graphed(torch.randn(size, 3)).shape == (size, 3)
    assert [shape[0] for shape in shapes] == [1, 2, 3, 4]


def test_graphs_are_asked_for_and_want_one_process_with_a_gpu() -> None:
    model, asked = Doubled(), TrainConfig("latents", "out", cuda_graphs=True)
    assert recorded(model, asked, World(0, 1, torch.device("cpu"))) is model
    assert recorded(model, TrainConfig("latents", "out"), World(0, 1, GPU)) is model
    assert isinstance(recorded(model, asked, World(0, 1, GPU)), Graphed)
    with pytest.raises(ValueError, match="one process"):
        recorded(model, asked, World(0, 2, GPU))
    with pytest.raises(ValueError, match="activations"):
        recorded(model, TrainConfig("latents", "out", cuda_graphs=True, checkpoint_activations=True), World(0, 1, GPU))


@needs_gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_replayed_steps_have_the_losses_of_launched_ones(tmp_path: Path, precision: str) -> None:
    (tmp_path / "latents").mkdir()
    shards = latent_folder(tmp_path / "latents")
    losses = []
    for graphs in (False, True):
        options = {"latents": str(shards), "checkpoint": "emoji", "window": 2, "uvit": dict(TINY)}
        out = tmp_path / f"graphs-{graphs}"
        config = TrainConfig(
            "latents", str(out), steps=12, batch_size=6, precision=precision, cuda_graphs=graphs, options=options
        )
        train(LatentStage(config), config, progress=False)
        losses.append([json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == "no" else 2e-2)
