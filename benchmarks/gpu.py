"""Speed and memory at the published size on a GPU, within eight minutes on an H200; writes JSON and a table.

    python -m benchmarks.gpu [--out out/gpu.json] [--repeats 3] [--dry-run]

The published size with random weights, in the automatic dtype (float16), beside diffusers' pipeline in float16 with the same
weights: 50 guided steps at 512 px for 1 and 8 pictures, the fraction of the measured matrix peak, joint guidance against text
to image, 8 captions, torch.compile and CUDA graphs, the preset fast, the few unguided steps of a distilled model, and device
memory with and without offloading.
`--dry-run` goes through the same code on the CPU at the bundled model's sizes, where the figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import in_turns, network_flops, peak_flops
from benchmarks.peers import Peer
from unidiffuser.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiffuser.checkpoints.config import V1, ModelConfig
from unidiffuser.checkpoints.parts import InMemoryTensors, make_part
from unidiffuser.checkpoints.skeleton import skeleton
from unidiffuser.encoders.autoencoder import autoencoder_kl
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.encoders.clip import clip_image_model, clip_text_model
from unidiffuser.media.files import write_text
from unidiffuser.options import resolve
from unidiffuser.path import NoisePath
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.runtime.acceleration import PRESETS
from unidiffuser.small.network import build
from unidiffuser.streams import Streams, item_generators

GUIDANCE = 8.0
PROMPT = "an astronaut on a horse"
DISTILLED: dict[str, Any] = {"steps": 4, "guidance": 1, "method": "lcm"}


def random_checkpoint(like: Checkpoint | ModelConfig, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """A checkpoint with random weights in main memory, of the sizes (and tokenizers) of another or of a config."""
    config = like if isinstance(like, ModelConfig) else like.config
    with skeleton():
        modules = {
            "uvit": build(config.uvit), "vae": autoencoder_kl(config.vae), "clip_text": clip_text_model(config.clip_text),
            "clip_image": clip_image_model(config.clip_image), "caption": CaptionDecoder(config.caption),
        }  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def fill(name: str, shape: Tensor) -> Tensor:
        if not shape.dtype.is_floating_point:
            return torch.zeros(shape.shape, dtype=shape.dtype)
        value = torch.randn(shape.shape, generator=generator, device=generator.device) * 0.02
        gains = name.endswith("weight") and shape.ndim == 1
        return (value + gains).to("cpu", dtype)

    parts = {
        part: make_part(part, InMemoryTensors({name: fill(name, value) for name, value in module.state_dict().items()}))
        for part, module in modules.items()
    }
    tokenizers = {} if isinstance(like, ModelConfig) else {
        "clip_tokenizer": like.clip_tokenizer().spec, "gpt2_tokenizer": like.gpt2_tokenizer().spec,
    }  # fmt: skip
    return Checkpoint(Path("random"), config, parts, tokenizers)


def memory(run: Callable[[], object]) -> float | None:
    """Peak device memory in GB during a run, earlier allocations included."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def seconds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return {name: times["wall_s"] for name, times in in_turns(runs, repeats).items()}


def measure(like: Checkpoint | ModelConfig, device: torch.device, steps: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The results, one group after another."""
    checkpoint = random_checkpoint(like, torch.float16, device)
    config = checkpoint.config
    options: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE}
    flops = network_flops(config.uvit)
    peak = peak_flops(device, torch.bfloat16, "wall_s")
    yield {"peak_tflops": peak / 1e12, "evaluation_tflop": flops / 1e12}

    offloaded = UniDiffuser(checkpoint, device, torch.float16, offload=True, tiling=True)
    yield {"memory_offloaded_gb": memory(lambda: offloaded.text_to_image(PROMPT, steps=2))}
    model = UniDiffuser(checkpoint, device, torch.float16)
    yield {"memory_gb": memory(lambda: model.text_to_image(PROMPT, steps=2))}

    def pictures(count: int, m: UniDiffuser = model, **more: Any) -> float:
        return seconds({"": lambda: m.text_to_image(PROMPT, count=count, **{**options, **more})}, repeats)[""]

    one, eight = pictures(1), pictures(8)
    work = 2 * steps * flops / peak  # seconds of one picture at the peak
    yield {"ours_s": {"batch 1": one, "batch 8": eight}, "peak_fraction": {"batch 1": work / one, "batch 8": 8 * work / eight}}
    fast = PRESETS["fast"](options)
    yield {"fast_s": pictures(1, **fast), "fast": fast}
    yield {"distilled_s": {"batch 1": pictures(1, **DISTILLED), "batch 8": pictures(8, **DISTILLED)}, "distilled": DISTILLED}

    # Joint guidance asks for three evaluations, text to image for two; latents only, no pictures or words made.
    plan, text = resolve(options, config), model.encode_texts([PROMPT])
    latents = seconds(
        {
            "text to image": lambda: model.run(NoisePath.text_to_image(steps), Streams(text=text), plan, item_generators(0, 1)),
            "joint": lambda: model.run(NoisePath.joint(steps), Streams(), plan, item_generators(0, 1)),
        },
        repeats,
    )
    yield {"latents_s": latents, "joint_ratio": latents["joint"] / latents["text to image"]}

    texts = torch.randn(8, config.caption.prefix_length, config.caption.hidden_dim, device=device)
    yield {"eight_captions_s": seconds({"": lambda: model.captioner.decode(texts)}, repeats)[""]}

    peer = Peer(model, torch.float16)
    side = config.image_size
    both = {
        "ours": lambda: model.text_to_image(PROMPT, **options),
        "diffusers": lambda: peer.text_to_image([PROMPT], steps, GUIDANCE, (side, side)),
    }
    times = seconds(both, repeats)
    yield {"float16_s": times, "speedup": times["diffusers"] / times["ours"]}

    for mode in ("default", "reduce-overhead"):
        compiled = UniDiffuser(checkpoint, device, torch.float16, compile=mode)
        compiled.net = model.net  # one copy of the weights
        few = pictures(1, compiled, **DISTILLED)
        fell_back = compiled._compiled.compiled is None
        yield {f"compile, {mode}": {"batch 1, s": pictures(1, compiled), "distilled, s": few, "fell back": fell_back}}


def table(found: Mapping[str, Any]) -> str:
    """The seconds of one and of eight pictures, by setting, and their ratio to ours, exact, of one picture."""
    exact = found["ours_s"]
    rows = [
        ("exact", exact["batch 1"], exact["batch 8"]),
        ("preset fast without a fast LoRA", found["fast_s"], None),
        ("distilled, 4 steps", found["distilled_s"]["batch 1"], found["distilled_s"]["batch 8"]),
        ("diffusers", found["float16_s"]["diffusers"], None),
    ]
    for mode in ("default", "reduce-overhead"):
        compiled = found[f"compile, {mode}"]
        rows += [(f"exact, compile {mode}", compiled["batch 1, s"], None)]
        rows += [(f"distilled, compile {mode}", compiled["distilled, s"], None)]
    lines = ["| setting | one picture, s | eight, s | as fast as exact |", "| --- | --- | --- | --- |"]
    for name, one, eight in rows:
        lines.append(f"| {name} | {one:.3f} | {'' if eight is None else f'{eight:.3f}'} | {exact['batch 1'] / one:.1f} |")
    peaks = [found["memory_gb"], found["memory_offloaded_gb"]]
    text = "\n".join(lines) + "\n"
    return text if None in peaks else f"{text}\nDevice memory: {peaks[0]:.1f} GB, offloaded {peaks[1]:.1f} GB.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        measured = measure(load_checkpoint("emoji"), torch.device("cpu"), 2, args.repeats)
    elif torch.cuda.is_available():
        measured = measure(V1, torch.device("cuda"), 50, args.repeats)
    else:
        parser.error("there is no CUDA device here; --dry-run shows that the command works")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": "cpu" if args.dry_run else torch.cuda.get_device_name(), "torch": torch.__version__}
    for part in measured:
        found |= part
        write_text(args.out, json.dumps(found, indent=1))
        print(json.dumps(part), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
