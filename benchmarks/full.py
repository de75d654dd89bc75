"""The published size, 952 M parameters, with random weights: one guided step of text to image (two evaluations) at 512 px."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.clock import network_flops, once, peak_flops
from benchmarks.peers import network
from unidiffuser.checkpoints.config import V1
from unidiffuser.guidance import Guidance, predict
from unidiffuser.runtime.precision import automatic_dtype, depends_on_batch, fix_batches
from unidiffuser.steppers import Interval, Level, Point, ddim
from unidiffuser.streams import Streams
from unidiffuser.uvit import UViT


class _Weights:
    """The part of a model that `peers.network` needs: state dict and config."""

    def __init__(self, net: UViT, device: torch.device):
        self.net, self.device, self.config, self.checkpoint = net, device, V1, self

    def state_dict(self, part: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.net.state_dict().items()}


@torch.inference_mode()
def measure(device: torch.device, clock: str, repeats: int) -> dict[str, Any]:
    """Times of a guided step in fp32 (ours, diffusers) and in the automatic dtype (ours), its deviations and peak fractions.

    Deviations from fp32 are of the single evaluations, of the guided prediction (8 times one less 7 times the other, which
    adds up what rounding did to both), and of the state after a step of DDIM, the first of 50 from label 500.
    """
    torch.manual_seed(0)
    net = UViT(V1.uvit, device=device).eval()
    shapes = V1.uvit.item_shapes
    g = torch.Generator().manual_seed(1)
    x = Streams(**{name: torch.randn(1, *shape, generator=g).to(device) for name, shape in shapes.items()})
    noise = {name: torch.randn(1, *shape, generator=g).to(device) for name, shape in shapes.items()}
    rule = Guidance(img=8.0)

    branches: list[torch.Tensor] = []  # the predictions before guidance combines them

    def step(run: Any, dtype: torch.dtype) -> torch.Tensor:
        def cast(img: Any, clip_img: Any, text: Any, *labels: Any, heads: Any) -> Any:
            out = run(img.to(dtype), clip_img.to(dtype), text.to(dtype), *labels, heads=heads)
            floats = tuple(None if o is None else o.float() for o in out)
            branches[:] = [o for o in floats if o is not None]
            return floats

        found = predict(cast, x, 500.0, 0.0, moving=("img",), guidance=rule, noise=noise.__getitem__)
        return torch.cat([found.need("img").flatten(), found.need("clip_img").flatten()])

    theirs = network(_Weights(net, device))  # the same tensors under other names

    def their_step() -> torch.Tensor:  # one evaluation after another, as UniDiffuserPipeline._get_noise_pred does
        t, zero, top = (torch.full((1,), v, device=device) for v in (500.0, 0.0, 1000.0))
        kind = torch.ones(1, dtype=torch.long, device=device)
        img, clip_img = x.need("img"), x.need("clip_img")
        one = theirs(img, clip_img, x.need("text"), t, zero, kind)
        two = theirs(img, clip_img, noise["text"], t, top, kind)
        return torch.cat([(8 * a - 7 * b).flatten() for a, b in list(zip(one, two, strict=True))[:2]])

    results: dict[str, torch.Tensor] = {}
    runs: dict[str, list[dict[str, float]]] = {"ours float32": [], "diffusers float32": [], "ours": []}
    for _ in range(repeats):
        runs["ours float32"].append(once(lambda: results.update(exact=step(net, torch.float32))))
        runs["diffusers float32"].append(once(lambda: results.update(theirs=their_step())))
    exact_branches = list(branches)
    dtype = automatic_dtype(device)
    net.to(dtype)
    if depends_on_batch(device, dtype):
        fix_batches(net)
    step(net, dtype)
    for _ in range(max(repeats, 3)):
        runs["ours"].append(once(lambda: results.update(ours=step(net, dtype))))
    times = {name: sorted(found, key=lambda t: t[clock])[len(found) // 2] for name, found in runs.items()}

    start = torch.cat([x.need("img").flatten(), x.need("clip_img").flatten()])
    interval = Interval(Level.of(500.0), Level.of(480.0), 0, 1)
    states = {name: ddim([Point(interval.level, start, eps)], interval) for name, eps in results.items()}
    deviations = {
        "evaluation": max(_deviation(a, b) for a, b in zip(branches, exact_branches, strict=True)),
        "guided prediction": _deviation(results["ours"], results["exact"]),
        "state after the step": _deviation(states["ours"], states["exact"]),
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "times": times,
        "tflop": 2 * network_flops(V1.uvit) / 1e12,
        "deviations": deviations,
        "deviation_of_diffusers": _deviation(results["theirs"], results["exact"]),
        "peak_gflops": {str(d).removeprefix("torch."): peak_flops(device, d, clock) / 1e9 for d in (torch.float32, dtype)},
    }


def _deviation(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
