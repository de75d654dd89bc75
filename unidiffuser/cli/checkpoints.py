"""The commands about checkpoint files: `convert` and `info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .application import Dtype, command, print_results, torch_dtype

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint

FILES = "Checkpoints and data"
MEBI = 1 << 20


@command(
    "convert",
    panel=FILES,
    examples=[
        "unidiffuser convert unidiffuser-v1/ unidiffuser-v1.safetensors --dtype float16",
        "unidiffuser convert uvit_v1.pth model.safetensors",
    ],
)
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="A folder with uvit_v1.pth, a diffusers folder, or a single file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the weights; unchanged if not given.")] = None,
) -> None:
    """Convert a checkpoint of any layout into one safetensors file."""
    from ..checkpoints.checkpoint import convert

    convert(source, target, torch_dtype(dtype))
    typer.echo(f"wrote {target}", err=True)


@command("info", panel=FILES, examples=["unidiffuser info", "unidiffuser info unidiffuser-v1/ --json"])
def info(
    model: Annotated[str, typer.Argument(help='"emoji", or a checkpoint file or folder.')] = "emoji",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")] = False,
) -> None:
    """Describe a checkpoint: its parts, sizes, defaults and words."""
    from rich.console import Console
    from rich.table import Table

    from ..checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(model)
    parts = _parts(checkpoint)
    if as_json:
        whole = {"path": str(checkpoint.path), "parts": parts, "config": checkpoint.config.to_dict()}
        print_results([json.dumps(whole, ensure_ascii=False, indent=1)], model)
        return
    table = Table("part", "parameters", "size", "dtype", title=str(checkpoint.path))
    for part in parts:
        size = f"{part['bytes'] / MEBI:,.1f} MiB"
        table.add_row(part["part"], f"{part['parameters']:,}", size, ", ".join(part["dtypes"]))
    table.add_section()
    total = sum(part["bytes"] for part in parts)
    table.add_row("all", f"{sum(part['parameters'] for part in parts):,}", f"{total / MEBI:,.1f} MiB", "")
    console = Console()
    console.print(table)
    properties = Table("property", "value")
    for name, value in _properties(checkpoint).items():
        properties.add_row(name, value)
    console.print(properties)


def _parts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = []
    for part in checkpoint.parts():
        tensors = list(checkpoint.state_dict(part).values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
        rows.append({"part": part, "parameters": count, "bytes": size, "dtypes": dtypes})
    return rows


def _properties(checkpoint: Checkpoint) -> dict[str, str]:
    """What a user of the checkpoint wants to know of its config, in words."""
    from ..options import side_multiple

    config = checkpoint.config
    net, side = config.uvit, config.image_size
    kinds = {0: "none (as v0)", 2: "curated and web (as v1)"}
    defaults = {"steps": 50, "guidance": 8.0, **config.defaults}
    defaults |= {f"steps for {task.replace('_', ' ')}": steps for task, steps in defaults.pop("task_steps", {}).items()}
    rows = {
        "image_size": f"{side} x {side} pixels; sides are multiples of {side_multiple(config)}",
        "latent": f"{net.in_chans} x {side // config.vae.downscale} x {side // config.vae.downscale}, "
        f"{config.vae.downscale} pixels a cell",
        "text": f"{net.num_text_tokens} tokens, {net.num_text_tokens - 2} of a prompt",
        "network": f"depth {net.depth}, width {net.embed_dim}, {net.num_heads} heads, patch {net.patch_size}",
        "kinds of captions": kinds.get(net.data_types, str(net.data_types)),
        "defaults": ", ".join(f"{name} {value}" for name, value in defaults.items()),
    }
    if config.vocabulary is not None:
        rows["vocabulary"] = "; ".join(reversed(config.vocabulary.summary(12).splitlines()))
    return rows
