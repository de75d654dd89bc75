"""The bundled network trained on one GPU for a given time: the number of steps is chosen to fit.

    python -m unidiffuser.emoji.studies.gpu_training pack data/emoji pictures.tar.gz
    python -m unidiffuser.emoji.studies.gpu_training run --data pictures.tar.gz --encoders MODEL --network MODEL [NAME ...]
    python -m unidiffuser.emoji.studies.gpu_training join MODEL out/gpu/NAME-uvit.safetensors OUT

`pack` writes the training pictures as one archive of 27 MB, for a machine without npm. `run` takes encoders and autoencoder
from one model (a decoder with its palette, stage 10) and the network to start from another (stage 7); its settings are those
of `11-uvit-gpu.yaml`. Several NAMEs (settings to compare) are trained side by side, one process each, because a step of so
small a network leaves the GPU idle most of the time. Each writes its network alone; `join` adds the encoders.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ...data.captioned import read_listed
from ...media.files import replacing
from ...small.network import config_of
from ...training.config import TrainConfig
from ...training.loop import train
from ..stages import make_stage

say = partial(print, flush=True)
CONFIG = Path(__file__).parents[1] / "configs/11-uvit-gpu.yaml"
FIELDS = ("text", "label", "style", "tone", "group", "split", "demo", "known")
SPLITS = ("train", "validation", "heldout_concept")  # no held-out pair is carried anywhere
PROBE = 150  # steps that tell how long one takes
NETWORKS: dict[str, dict[str, Any]] = {  # options that are other than in the file
    "velocity": {},  # the bundled one
    "nothing-borrowed": {"drawing": {"borrow": 0.0}},
}


def pack(data: Path, archive: Path) -> None:
    """The pictures that training reads, as lossless WebP, with their metadata; no held-out pair is among them."""
    pairs = [pair for pair in read_listed(data) if pair.fields["tone"] == 0 and pair.split in SPLITS]
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        lines = []
        for pair in pairs:
            name = f"images/{pair.path.stem}.webp"
            with io.BytesIO() as buffer:
                pair.image().save(buffer, "WEBP", lossless=True, quality=80, method=4)
                add(name, buffer.getvalue())
            lines.append(json.dumps({"file_name": name} | {key: pair.fields[key] for key in FIELDS}))
        add("metadata.jsonl", "\n".join(lines).encode())
    say(f"{archive}: {len(pairs)} pictures, {archive.stat().st_size / 1e6:.1f} MB")


def settings(name: str, data: Path, encoders: Path, network: Path, out: Path, **values: Any) -> TrainConfig:
    """Those of the file with the options of NAME; nothing is kept or drawn on the way of a run of minutes."""
    config = TrainConfig.from_file(CONFIG, out=str(out / name), **values)
    options = config.options | {"data": str(data), "checkpoint": str(encoders), "network_of": str(network)}
    for key, value in NETWORKS[name].items():
        options[key] = options[key] | value if isinstance(value, dict) else value
    never = 10**9
    return replace(config, save_every=never, sample_every=never, options=options)


def train_for(seconds: float, config: TrainConfig) -> Path:
    """Train the network for so many seconds, making its latents not counted; the file with its averaged weights alone."""
    from safetensors.torch import save_file

    stage: Any = make_stage(config)
    began, marks = time.monotonic(), []
    weights = copy.deepcopy(stage.model.state_dict())
    stage.export = stage.sample = lambda model: None
    probe = replace(config, out=f"{config.out}-probe", steps=PROBE, warmup_steps=20, decay=1e-3)
    train(stage, probe, progress=False, watch=lambda *_: marks.append(time.monotonic()))
    stage.model.load_state_dict(weights)
    half = PROBE // 2
    step = (marks[-1] - marks[-1 - half]) / half
    steps = max(1, int((seconds - (time.monotonic() - began)) / step))
    say(f"{config.out}: {1000 * step:.1f} ms a step of {config.batch_size}, {steps} steps")

    def tell(done: int, terms: dict[str, float], *_: Any) -> None:
        if done % max(1, steps // 10) == 0:
            say(f"{config.out}: {done}", *(f"{name} {value:.4f}" for name, value in terms.items()))

    trained = train(stage, replace(config, steps=steps), progress=False, watch=tell)
    path = Path(f"{config.out}-uvit.safetensors")
    with replacing(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in trained.state_dict().items()}, temporary)
    return path


def join(model: Path, uvit: Path, out: Path) -> None:
    """A network that `run` has written, with the encoders and the autoencoder of a model."""
    from safetensors.torch import load_file

    given = load_checkpoint(model)
    config = TrainConfig.from_file(CONFIG)
    parts = {name: given.state_dict(name) for name in given.parts() if name != "uvit"} | {"uvit": load_file(uvit)}
    sizes = config_of(vars(given.config.uvit) | config.options["uvit"])
    whole = replace(given.config, uvit=sizes, defaults=config.options["defaults"])
    save_checkpoint(out, whole, parts, given.tokenizer_specs(), torch.float16)


def run(names: list[str], data: Path, encoders: Path, network: Path, out: Path, seconds: float, batch_size: int) -> None:
    """One name in this process; several in one each, at the same time, each with a log."""
    out.mkdir(parents=True, exist_ok=True)
    if data.is_file():
        with tarfile.open(data) as tar:
            tar.extractall(out / "data", filter="data")
        data = out / "data"
    if len(names) == 1:
        config = settings(names[0], data, encoders, network, out, batch_size=batch_size)
        say(f"{train_for(seconds, config)} is written")
        return
    given = {"data": data, "encoders": encoders, "network": network, "out": out, "seconds": seconds, "batch-size": batch_size}
    arguments = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    running = {}
    for name in names:
        with (out / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "unidiffuser.emoji.studies.gpu_training", "run", name, *arguments]
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    failed = [name for name, process in running.items() if process.wait()]
    for name in names:
        lines = (out / f"{name}.log").read_text().splitlines()
        say(*lines[-20 if name in failed else -3 :], sep="\n")
    if failed:
        raise SystemExit(f"{', '.join(failed)}: failed, see the logs in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("data", type=Path)
    packing.add_argument("archive", type=Path)
    joining = commands.add_parser("join")
    for name in ("model", "uvit", "out"):
        joining.add_argument(name, type=Path)
    running = commands.add_parser("run")
    running.add_argument("names", nargs="*", metavar="NAME", default=["velocity"], help=", ".join(NETWORKS))
    for name in ("--data", "--encoders", "--network"):
        running.add_argument(name, type=Path, required=True)
    running.add_argument("--out", type=Path, default=Path("out/gpu"))
    running.add_argument("--seconds", type=float, default=450.0, help="of training each")
    running.add_argument("--batch-size", type=int, default=256)
    given = vars(parser.parse_args())
    if unknown := set(given.get("names", [])) - set(NETWORKS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    chosen: dict[str, Callable[..., None]] = {"pack": pack, "join": join, "run": run}
    chosen[given.pop("command")](**given)


if __name__ == "__main__":
    main()
