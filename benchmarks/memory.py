"""Memory and work of the published checkpoint, computed from its sizes, and measured in a fresh process.

    python -m benchmarks.memory [--doc docs/checkpoint.md]                             # computed
    python -m benchmarks.memory --measure CHECKPOINT [--side 256] [--steps 2] [--dtype float32]

Weights are counted, activations are those of the operators' outputs that are alive at the same time, with attention that
never holds its matrix (as the fused kernels). Workspaces of libraries come on top.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.clock import network_flops
from benchmarks.published_size import shapes_of
from unidiffuser.checkpoints.config import V1, ModelConfig
from unidiffuser.encoders.autoencoder import autoencoder_kl
from unidiffuser.media.files import write_between
from unidiffuser.small.network import build

MARKERS = "<!-- memory: python -m benchmarks.memory -->", "<!-- /memory -->"
SIDES = (256, 512)
GUIDED = 2  # evaluations of a guided step, in one batch
BEAMS = 5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside and still alive; `peak` is their maximum. Works on "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen and id(storage) not in before:  # an output may be a view of an input
                    self.seen[storage] = True
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class _FusedAttention(TorchFunctionMode):
    """Attention that allocates its result only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of intermediate results, and the result, that are alive at once."""
    with torch.inference_mode(), _FusedAttention(), LiveBytes() as live:
        run()
    return live.peak


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint at work: weights of each part, and activations of the network and the autoencoder."""

    weights: dict[str, int]
    network: int
    encode: int
    decode: int
    captions: int

    def text_to_image(self, offload: bool = False) -> int:
        """Peak: each part is loaded before it works and, unless offloaded, stays."""
        return _peak([("clip_text", 0), ("uvit", self.network), ("vae", self.decode)], self.weights, offload)

    def image_to_text(self, offload: bool = False) -> int:
        phases = [("clip_image", 0), ("vae", self.encode), ("uvit", self.network), ("caption", self.captions)]
        return _peak(phases, self.weights, offload)

    def with_network_in(self, bits: int) -> Sizes:
        """The same with the network's weights, those of float16, in fewer bits; it computes as before."""
        return replace(self, weights=self.weights | {"uvit": self.weights["uvit"] * bits // 16})


def _peak(phases: list[tuple[str, int]], weights: Mapping[str, int], offload: bool) -> int:
    before, peak = 0, 0
    for part, activations in phases:
        peak = max(peak, before + weights[part] + activations)
        before += 0 if offload else weights[part]
    return peak


def sizes(config: ModelConfig, side: int, dtype: torch.dtype) -> Sizes:
    """Bytes for one picture of `side` pixels with all weights in `dtype`."""
    weights = {
        part: sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in shapes.values())
        for part, shapes in shapes_of(config).items()
    }
    uvit, cells = config.uvit, side // config.vae.downscale
    net = build(uvit, device="meta").to(dtype)
    shapes = uvit.item_shapes | {"img": (uvit.in_chans, cells, cells)}
    given = [torch.empty(GUIDED, *shape, device="meta", dtype=dtype) for shape in shapes.values()]
    labels = [torch.empty(GUIDED, device="meta") for _ in range(2)]
    with torch.device("meta"):
        vae = torch.nn.Module.to(autoencoder_kl(config.vae), dtype)  # diffusers' own `to` warns
    latent = torch.empty(1, config.vae.embed_dim, cells, cells, device="meta", dtype=dtype)
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=dtype)
    gpt2, length = config.caption.gpt2, config.caption.prefix_length + config.caption.max_new_tokens
    return Sizes(
        weights,
        network=peak_bytes(lambda: net(*given, *labels)),
        encode=peak_bytes(lambda: vae.encode(pixels)),
        decode=peak_bytes(lambda: vae.decode(latent)),
        captions=BEAMS * length * gpt2["n_layer"] * 2 * gpt2["n_embd"] * dtype.itemsize,  # keys and values
    )


def table(config: ModelConfig = V1) -> str:
    """Markdown tables: memory by number format, and work by size."""
    full, half = ([sizes(config, side, dtype) for side in SIDES] for dtype in (torch.float32, torch.float16))
    rows = [
        ("float32", full, False),
        ("float16, bfloat16", half, False),
        ("network in fp8 (ComfyUI)", [found.with_network_in(8) for found in half], False),
        ("float32, `offload`", full, True),
        ("float16, `offload`", half, True),
    ]
    lines = ["| GB | all weights | text to image, 256 px | 512 px | captioning, 256 px | 512 px |", "|---|" + "---|" * 5]
    for name, found, offload in rows:
        cells = [sum(found[0].weights.values())]
        cells += [s.text_to_image(offload) for s in found] + [s.image_to_text(offload) for s in found]
        lines.append(f"| {name} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")
    lines += ["", "| side | one evaluation, TFLOP | 50 guided steps, TFLOP |", "|---|---|---|"]
    for side in SIDES:
        latent = side // config.vae.downscale, side // config.vae.downscale
        flop = network_flops(config.uvit, 1, latent) / 1e12
        lines.append(f"| {side} px | {flop:.2f} | {2 * 50 * flop:.0f} |")
    return "\n".join(lines) + "\n"


_PROGRAM = """
import json, time
from pathlib import Path
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
import torch, unidiffuser.pipeline, unidiffuser.encoders.captions, unidiffuser.encoders.autoencoder, unidiffuser.encoders.clip
import diffusers.models.autoencoders.autoencoder_kl
found, start = {"before": peak()}, time.perf_counter()
def done(name):
    global start
    found[name] = {"s": round(time.perf_counter() - start, 1), "peak": peak()}
    print(json.dumps({name: found[name]}), flush=True)
    start = time.perf_counter()
model = unidiffuser.load(PATH, device="cpu", dtype=DTYPE)
for part in ("net", "text_encoder", "image_token_encoder", "autoencoder", "captioner"):
    getattr(model, part)
done("load")
options = {"steps": STEPS, "width": SIDE, "height": SIDE, "seed": 0}
picture = model.text_to_image("a red apple", **options)[0]
done("text_to_image")
caption = model.image_to_text(picture, **options)[0]
done("image_to_text")
def modules_of(part):
    return [part] if isinstance(part, torch.nn.Module) else [m for m in vars(part).values() if isinstance(m, torch.nn.Module)]
parts = [model.net, model.autoencoder, model.captioner, model.text_encoder, model.image_token_encoder]
modules = [module for part in parts for module in modules_of(part)]
tensors = {t.data_ptr(): t.numel() * t.element_size() for m in modules for t in [*m.parameters(), *m.buffers()]}
found |= {"weights": sum(tensors.values()), "caption": caption, "size": picture.size}
print(json.dumps(found))
"""


def measure(path: Path, side: int, steps: int, dtype: str) -> dict[str, Any]:
    """Seconds and peak resident memory (bytes; Linux) of loading, one picture and its caption, in a fresh process."""
    program = f"PATH, SIDE, STEPS, DTYPE = {str(path)!r}, {side}, {steps}, {dtype!r}\n" + _PROGRAM
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    peak = found["image_to_text"]["peak"]
    return {"checkpoint": path.name, **found, "ratio": peak / found["weights"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doc", type=Path, help="write the computed tables into this file, between the markers")
    parser.add_argument("--measure", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.side, args.steps, args.dtype)))
        return
    text = table()
    print(text)
    if args.doc:
        write_between(args.doc, text, MARKERS)


if __name__ == "__main__":
    main()
