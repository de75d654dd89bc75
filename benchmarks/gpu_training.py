"""The bundled model in a few minutes of one GPU: every stage is given seconds, and takes as many steps as fit into them.

    python -m benchmarks.gpu_training pack data/emoji pictures.tar.gz       # 35 MB, for a GPU machine that cannot reach npm
    python -m benchmarks.gpu_training run --data pictures.tar.gz --start START.safetensors [--out out/gpu] [--seconds 480]

An autoencoder of plain latents, with the fourth channel and without (the one without is taken where it is no worse than 29.3
dB); then two networks side by side, which one process each leaves room for, with much and with very much of other things; then
the decoder on each network's errors. START gives the encoders and the network to go on from. Written below --out: what the
stages write, and the two halves of each model that are new, `NAME-uvit.safetensors` and `NAME-vae.safetensors` in float16,
which is all that has to be carried home. `join START UVIT VAE OUT` makes them one file again.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unidiffuser.checkpoints import load_checkpoint, save_checkpoint
from unidiffuser.files import replacing, write_text
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.loop import train
from unidiffuser.training.stage import Stage
from unidiffuser.training.stages import make_stage

say = partial(print, flush=True)
FOUR = ["noto", "twemoji", "flat", "fluent"]
FIELDS = ("text", "label", "style", "tone", "group", "split", "demo", "known")
TONES = (0, 5)  # of the skin tones one is enough for an autoencoder
SPLITS = ("train", "validation", "heldout_concept")
TEST = {"split": ["heldout_concept"], "style": FOUR, "tone": [0]}
ENOUGH_DB = 29.3
PROBE = 200  # steps that tell how long one takes
NETWORKS: dict[str, dict[str, Any]] = {
    "much": {"where": {"tone": [0], "style": FOUR}, "share": 0.5, "changed_below": 400},
    "most": {"where": {"tone": [0]}, "share": 0.85, "changed_below": 500},  # seven houses
}


def pack(data: Path, archive: Path) -> None:
    """The pictures that training reads, as lossless WebP, with their metadata; no held-out pair is among them."""
    records = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [r for r in records if r["tone"] in TONES and r["split"] in SPLITS]
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        lines = []
        for record in records:
            name = f"images/{Path(record['file_name']).stem}.webp"
            with Image.open(data / record["file_name"]) as image, io.BytesIO() as buffer:
                image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
                add(name, buffer.getvalue())
            lines.append(json.dumps({"file_name": name} | {key: record[key] for key in FIELDS}))
        add("metadata.jsonl", "\n".join(lines).encode())
    say(f"{archive}: {len(records)} pictures, {archive.stat().st_size / 1e6:.1f} MB")


def in_seconds(config: TrainConfig, seconds: float) -> Path:
    """Train a stage for so many seconds, making its data not counted; the folder it has written."""
    stage: Stage = make_stage(config)
    stage.batch(torch.arange(min(config.batch_size, stage.size)))  # pictures are read when they are first asked for
    marks: list[float] = []

    def keep(done: int, *_: Any) -> None:
        marks.append(time.monotonic())

    nothing = {"export": lambda model: None, "sample": lambda model: None}
    vars(stage).update(nothing)  # for the probe; the class has the real ones
    probe = replace(config, out=f"{config.out}-probe", steps=min(PROBE, int(seconds)), decay=1e-3)
    Path(probe.out).mkdir(parents=True, exist_ok=True)
    train(stage, probe, progress=False, watch=keep)
    for name in nothing:
        delattr(stage, name)
    half = len(marks) // 2
    step = (marks[-1] - marks[-1 - half]) / half
    steps = max(1, int((seconds - (marks[-1] - marks[0])) / step))
    say(f"{config.out}: {1000 * step:.2f} ms a step, {steps} steps of {config.batch_size}")

    def tell(done: int, terms: dict[str, float], *_: Any) -> None:
        if done % max(1, steps // 10) == 0:
            say(f"{config.out}: {done}", *(f"{name} {value:.4f}" for name, value in terms.items()))

    train(stage, replace(config, steps=steps), progress=False, watch=tell)
    return Path(config.out)


def settings(stage: str, out: Path, batch_size: int, **values: Any) -> TrainConfig:
    options = values.pop("options")
    never = 10**9  # a run of minutes keeps nothing on the way
    return TrainConfig(stage, str(out), batch_size=batch_size, betas=(0.9, 0.99), save_every=never, sample_every=never,
                       cuda_graphs=True, workers=4, options=options, **values)  # fmt: skip


def autoencoder(data: Path, out: Path, only_plain: bool, batch_size: int) -> TrainConfig:
    return settings("autoencoder", out, batch_size, learning_rate=1.5e-3, decay=0.6, weight_decay=0.0, options={
        "data": str(data), "image_size": 128, "patch_size": 4, "channels": [96], "layers": 1, "mse_weight": 3.0, "plain": 1.0,
        "only_plain": only_plain, "noise": 0.3, "test": TEST,
    })  # fmt: skip


def network(data: Path, out: Path, encoders: Path, start: Path, drawing: dict[str, Any], batch_size: int) -> TrainConfig:
    whole = [1.0, 0.0]
    return settings("uvit", out, batch_size, optimizer="muon", learning_rate=1.2e-3, warmup_steps=200, decay=0.6,
                    weight_decay=0.05, ema_decay=0.9993, options={
        "data": str(data), "where": {"tone": [0], "demo": [True]}, "image_size": 128,
        "defaults": {"steps": 12, "guidance": 3.0},
        "checkpoint": str(encoders), "network_of": str(start), "uvit": {"detail_width": 128}, "caption_shares": [0.95, 0.05],
        "mix": {"independent": 0.08, "clean_text": 0.53, "clean_image": 0.17, "equal": 0.18, "no_text": 0.04},
        "weights": {"text": 15, "clip_img": 3}, "lean": 0.6, "logit_normal": [0.6, 1.1],
        "captioning": {"where": {"tone": [0], "known": [True]}, "versions": 4, "place": 0.6, "colour": 0.0, "swap": 0.9,
                       "swap_within": "style", "caption_shares": whole},
        "drawing": {"versions": 3, "place": 0.8, "mirror": True, "colour": 0.0, "repaint": 0.5, "repaint_within": "label",
                    "repaint_from": 300, "caption_shares": whole} | drawing,
    })  # fmt: skip


def decoder(data: Path, out: Path, model: Path, batch_size: int) -> TrainConfig:
    return settings("decoder", out, batch_size, learning_rate=7e-4, warmup_steps=50, decay=0.8, weight_decay=0.0, options={
        "data": str(data), "image_size": 128, "checkpoint": str(model), "noise": 0.3, "denoised": 0.4, "labels": [50, 650],
        "known": {"tone": [0], "demo": [True]}, "mse_weight": 3.0, "test": TEST,
    })  # fmt: skip


def encoders_with(start: Path, run: Path, out: Path) -> None:
    """The encoders of a model with an autoencoder of its own shape that was trained since, without a network."""
    given = load_checkpoint(start)
    trained = torch.load(run / "autoencoder.pt", map_location="cpu", weights_only=True)
    parts = {name: given.state_dict(name) for name in given.parts() if name not in ("uvit", "vae")}
    parts["vae"] = {name.removeprefix("kl."): value for name, value in trained.items()}
    save_checkpoint(out, given.config, parts, given.tokenizer_specs(), torch.float16)


def split(model: Path, out: Path) -> None:
    """`-uvit` and `-vae` of a model as files of their own."""
    from safetensors.torch import save_file

    given = load_checkpoint(model)
    for part in ("uvit", "vae"):
        with replacing(out.with_name(f"{out.stem}-{part}.safetensors")) as temporary:
            save_file({k: v.half().contiguous() for k, v in given.state_dict(part).items()}, temporary)


def join(start: Path, uvit: Path, vae: Path, out: Path) -> None:
    """What `split` cut, with the encoders and tokenizers of the model it began from."""
    from safetensors.torch import load_file

    given = load_checkpoint(start)
    parts = {name: given.state_dict(name) for name in given.parts()} | {"uvit": load_file(uvit), "vae": load_file(vae)}
    width = parts["uvit"]["detail.conv_out.weight"].shape[1]
    config = replace(given.config, uvit=replace(given.config.uvit, detail_width=width))
    save_checkpoint(out, config, parts, given.tokenizer_specs(), torch.float16)


def side_by_side(out: Path, stages: dict[str, list[str]]) -> None:
    """Stages as processes of their own at the same time, each with a log; the last lines of all when they are done."""
    running = {}
    for name, arguments in stages.items():
        with (out / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_training", "stage", name, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    failed = [name for name, process in running.items() if process.wait()]
    for name in stages:
        lines = (out / f"{name}.log").read_text().splitlines()
        say(*lines[-20 if name in failed else -3 :], sep="\n")
    if len(failed) == len(stages):
        raise SystemExit(f"{', '.join(failed)}: failed, see the logs in {out}")


def run(data: Path, start: Path, out: Path, seconds: float, batch_size: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if data.is_file():
        with tarfile.open(data) as tar:
            tar.extractall(out / "data", filter="data")
        data = out / "data"
    common = ["--data", str(data), "--start", str(start), "--out", str(out), "--batch-size", str(batch_size)]

    def given(share: float) -> list[str]:
        return [*common, "--seconds", str(share * seconds)]

    side_by_side(out, {name: given(0.14) for name in ("autoencoder-plain", "autoencoder-four")})
    reached = {
        run: float((out / run / "psnr.txt").read_text().split()[-1]) for run in ("autoencoder-plain", "autoencoder-four")
    }
    best = max(reached, key=lambda run: (reached[run] >= ENOUGH_DB and "plain" in run, reached[run]))
    say(f"{reached} dB; taken: {best}")
    encoders_with(start, out / best, out / "encoders.safetensors")
    side_by_side(out, {f"network-{name}": given(0.8) for name in NETWORKS})
    made = [name for name in NETWORKS if (out / f"network-{name}" / "model.safetensors").is_file()]
    side_by_side(out, {f"decoder-{name}": given(0.06) for name in made})
    for name in made:
        model = out / f"decoder-{name}" / "model.safetensors"
        split(model if model.is_file() else out / f"network-{name}" / "model.safetensors", out / f"{name}.safetensors")
    write_text(out / "made.json", json.dumps({"autoencoders": reached, "taken": best, "networks": made}, indent=1))


def stage(name: str, data: Path, start: Path, out: Path, seconds: float, batch_size: int) -> None:
    kind, which = name.split("-")
    config = {
        "autoencoder": lambda: autoencoder(data, out / name, which == "plain", batch_size // 4),
        "network": lambda: network(data, out / name, out / "encoders.safetensors", start, NETWORKS[which], batch_size),
        "decoder": lambda: decoder(data, out / name, out / f"network-{which}" / "model.safetensors", batch_size // 3),
    }[kind]()
    written = in_seconds(config, seconds)
    if kind != "network":
        say(f"{name}: {(written / 'psnr.txt').read_text().strip()} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("data", type=Path)
    packing.add_argument("archive", type=Path)
    joining = commands.add_parser("join")
    for name in ("start", "uvit", "vae", "out"):
        joining.add_argument(name, type=Path)
    for command in ("run", "stage"):
        own = commands.add_parser(command)
        if command == "stage":
            own.add_argument("name")
        for name in ("--data", "--start"):
            own.add_argument(name, type=Path, required=True)
        own.add_argument("--out", type=Path, default=Path("out/gpu"))
        own.add_argument("--seconds", type=float, default=480.0, help="of training, in all")
        own.add_argument("--batch-size", type=int, default=256)
    given = vars(parser.parse_args())
    {"pack": pack, "join": join, "run": run, "stage": stage}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
