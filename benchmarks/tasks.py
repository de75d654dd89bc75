"""Every task beside diffusers' pipeline on a network that both can run, the bundled model's own times, and where they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import unidiffuser
from benchmarks.clock import in_turns
from benchmarks.peers import Peer, plain_checkpoint
from unidiffuser.pipeline import UniDiffuser

PICTURE = Path(unidiffuser.__file__).with_name("assets") / "example.png"
PROMPT = "red apple, noto"
BATCHES = (1, 4, 16)
FAST = {"text to image": 4, "captioning": 2, "joint": 6, "image variation": 4}
"""Steps of a distilled model by task, where there is none that says so."""
Task = Callable[[Any, int], object]


def ours(speeds: tuple[float, float] | None = None, **options: Any) -> dict[str, Task]:
    """The tasks of this library by name, as functions of a model and a count; `speeds` are those of pairs, or the model's."""
    picture = Image.open(PICTURE).convert("RGB")
    return {
        "text to image": lambda m, n: m.text_to_image(PROMPT, count=n, **options),
        "captioning": lambda m, n: m.image_to_text([picture] * n, **options),
        "joint": lambda m, n: m.joint(count=n, speeds=speeds, **options),
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
    """Rows of task, batch and times, all on one network: ours in the automatic dtype, in float32 and with the steps of a
    distilled model; diffusers in float32 and in ours."""
    bundled = unidiffuser.load(name, device=device)
    plain, fewest = plain_checkpoint(bundled.checkpoint), fast_steps(bundled)
    model, exact = (UniDiffuser(plain, device, dtype) for dtype in (None, torch.float32))
    peers = {"diffusers float32": Peer(exact, torch.float32)}
    if model.dtype != torch.float32:
        peers[f"diffusers {str(model.dtype).removeprefix('torch.')}"] = Peer(exact, model.dtype)
    other = theirs(steps, guidance, plain.config.image_size)
    for task in other:
        mine = ours((1, 1), steps=steps, guidance=guidance)[task]  # as in diffusers, both streams at each step
        fast = ours((0, 1), steps=fewest[task], guidance=1, method="lcm")[task]
        for batch in batches:
            contestants: dict[str, Callable[[], object]] = {
                "ours": lambda t=mine, n=batch: t(model, n),
                "ours float32": lambda t=mine, n=batch: t(exact, n),
                "ours fast": lambda t=fast, n=batch: t(model, n),
            }
            for label, peer in peers.items():
                contestants[label] = lambda t=other[task], p=peer, n=batch: t(p, n)
            times = in_turns(contestants, repeats)
            yield {"task": task, "batch": batch, "steps": steps, "fewest": fewest[task], "times": times}


def fast_steps(model: UniDiffuser) -> dict[str, int]:
    """Steps of the preset fast by task, or those of `FAST` for a model without a fast LoRA."""
    routes = {
        "text to image": ["text_to_image"],
        "captioning": ["image_to_text"],
        "joint": ["joint"],
        "image variation": ["image_to_text", "text_to_image"],
    }
    if model._loras.student is None:
        return dict(FAST)
    return {task: model.resolve({"preset": "fast"}, *found)["steps"] for task, found in routes.items()}


def own(name: str, device: torch.device, repeats: int, batches: tuple[int, ...] = BATCHES) -> Iterator[dict[str, Any]]:
    """The times of a model as it is, exact and fast, and what part of them text, network and decoders take."""
    model = unidiffuser.load(name, device=device)
    with measured(model) as seconds:
        for task in ours():
            for batch in batches:
                runs = {preset: lambda p=preset, t=task, n=batch: ours(preset=p)[t](model, n) for preset in ("exact", "fast")}
                times, parts = {}, {}
                for preset, run in runs.items():  # not in turns: each change of the preset puts other weights in place
                    times |= in_turns({preset: run}, repeats)
                    seconds.clear()
                    run()
                    parts[preset] = dict(seconds)
                yield {"task": task, "batch": batch, "times": times, "parts": parts}


PARTS = {
    "encode": ("encode_texts", "encode_images"),
    "network": ("run",),
    "decode": ("decode_images", "decode_candidates"),
}


@contextmanager
def measured(model: UniDiffuser) -> Iterator[dict[str, float]]:
    """Seconds that calls of a model spend in its parts, added up until they are cleared; the GPU's work included."""
    seconds: dict[str, float] = {}

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = method(*args, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started
            return found

        return call

    for part, methods in PARTS.items():
        for method in methods:
            setattr(model, method, timed(part, getattr(model, method)))
    try:
        yield seconds
    finally:
        for methods in PARTS.values():
            for method in methods:
                delattr(model, method)


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
