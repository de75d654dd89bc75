"""Every task compared with diffusers' pipeline with the same weights, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import unidiffuser
from benchmarks.clock import in_turns
from benchmarks.peers import Peer
from unidiffuser.pipeline import UniDiffuser

PICTURE = Path(unidiffuser.__file__).with_name("assets") / "example.png"
PROMPT = "red apple, noto"
BATCHES = (1, 4, 16)
Task = Callable[[Any, int], object]


def ours(steps: int, guidance: float) -> dict[str, Task]:
    """The tasks of this library by name, as functions of a model and a count."""
    options: dict[str, Any] = {"steps": steps, "guidance": guidance}
    picture = Image.open(PICTURE).convert("RGB")
    return {
        "text to image": lambda m, n: m.text_to_image(PROMPT, count=n, **options),
        "captioning": lambda m, n: m.image_to_text([picture] * n, **options),
        "joint": lambda m, n: m.joint(count=n, **options),
        "image variation": lambda m, n: m.vary_image(picture, count=n, **options),
    }


def theirs(steps: int, guidance: float, side: int) -> dict[str, Task]:
    """The same tasks of a `Peer`."""
    picture = Image.open(PICTURE).convert("RGB").resize((side, side))
    return {
        "text to image": lambda p, n: p.text_to_image([PROMPT] * n, steps, guidance),
        "captioning": lambda p, n: p.image_to_text([picture] * n, steps, guidance),
        "joint": lambda p, n: p.joint(n, steps, guidance),
        "image variation": lambda p, n: p.vary_image(picture, n, steps, guidance),
    }


def measure(
    name: str, device: torch.device, steps: int, guidance: float, repeats: int, batches: tuple[int, ...] = BATCHES
) -> Iterator[dict[str, Any]]:
    """Rows of task, batch and times: ours in the automatic dtype and in float32, diffusers in float32 and in ours."""
    model = unidiffuser.load(name, device=device)
    exact = model if model.dtype == torch.float32 else UniDiffuser(model.checkpoint, device, torch.float32)
    peers = {"diffusers float32": Peer(model, torch.float32)}
    if model.dtype != torch.float32:
        peers[f"diffusers {str(model.dtype).removeprefix('torch.')}"] = Peer(model, model.dtype)
    mine, other = ours(steps, guidance), theirs(steps, guidance, model.config.image_size)
    for task in mine:
        for batch in batches:
            contestants: dict[str, Callable[[], object]] = {
                "ours": lambda t=mine[task], n=batch: t(model, n),
                "ours float32": lambda t=mine[task], n=batch: t(exact, n),
            }
            for label, peer in peers.items():
                contestants[label] = lambda t=other[task], p=peer, n=batch: t(p, n)
            yield {"task": task, "batch": batch, "steps": steps, "times": in_turns(contestants, repeats)}


def scaling(name: str, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Times of text to image at other batch sizes, steps and picture sizes than 4 pictures and 20 steps."""
    model = unidiffuser.load(name, device=device)
    side = model.config.image_size
    settings = [("batch", n, {"count": n}) for n in (1, 2, 4, 8, 16, 32)]
    settings += [("steps", n, {"count": 4, "steps": n}) for n in (5, 10, 20, 40)]
    sizes = [(side, side), (256, 256), (512, 512), (512, 768), (768, 768)]
    settings += [("size", w * h, {"count": 1, "width": w, "height": h}) for w, h in dict.fromkeys(sizes)]
    for axis, value, options in settings:
        options = {"steps": 20, "guidance": 4.0} | options
        times = in_turns({"ours": lambda o=options: model.text_to_image(PROMPT, **o)}, repeats)["ours"]
        yield {"axis": axis, "value": value, "options": options, "times": times}
