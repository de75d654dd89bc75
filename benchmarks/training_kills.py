"""Kill a random process of a run at random moments, again and again; its losses must be those of a run that was left alone.

    python benchmarks/training_kills.py LATENTS OUT [--kills 20] [--strategy fsdp]

LATENTS: a folder of `unidiffuser data encode`. Two gloo processes, started again by torchrun after each kill -9. After every
kill the script looks at what lies under final names: all checkpoints must load whole, all else must be of a known kind.
Exit code 1 if there were fewer kills than asked for, or any difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from unidiffuser.training.saving import checkpoints


def config(arguments: argparse.Namespace, out: Path) -> Path:
    sizes = {
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 2,
        "patch_size": 4,
        "text_dim": 64,
        "num_text_tokens": 12,
        "clip_img_dim": 128,
    }
    values = {
        "stage": "latents", "out": str(out), "steps": arguments.steps, "batch_size": 16, "learning_rate": 1e-3,
        "warmup_steps": 5, "precision": "no", "save_every": 5, "sample_every": 10**6, "strategy": arguments.strategy,
        "options": {"latents": str(arguments.latents), "checkpoint": "emoji", "uvit": sizes},
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def launch(path: Path, restarts: int, log: Path) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={restarts}", "-m", "unidiffuser", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def look(out: Path) -> None:
    """Everything under a final name is whole."""
    for folder in checkpoints(out):
        json.loads((folder / "run.json").read_text())
        parts = sorted(p.name for p in folder.iterdir())
        assert ".metadata" in parts, (folder, parts)
        assert sum(p.endswith(".distcp") for p in parts) == 2, (folder, parts)
    for path in (out / "losses.jsonl", out / "config.json", out / "speed.json"):
        if path.is_file() and path.suffix == ".json":
            json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500, help="enough that the run outlives the kills")
    parser.add_argument("--span", type=float, default=4, help="seconds after a checkpoint in which the kill falls")
    parser.add_argument("--strategy", default="ddp")
    arguments = parser.parse_args()
    whole, broken = arguments.out / "whole", arguments.out / "broken"
    if not (whole / "model.safetensors").is_file():
        assert launch(config(arguments, whole), 0, arguments.out / "whole.log").wait() == 0
    chance = random.Random(0)
    process = launch(config(arguments, broken), arguments.kills + 1, arguments.out / "broken.log")
    moments = []
    seen: set[int] = set()
    while len(moments) < arguments.kills and process.poll() is None:
        workers = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
        fresh = [pid for pid in workers if pid not in seen]
        if len(fresh) < 2:
            time.sleep(0.2)
            continue
        if chance.random() < 0.8:  # while it trains or writes; else while it starts
            before = checkpoints(broken)
            while process.poll() is None and checkpoints(broken) == before:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, arguments.span))
        else:
            time.sleep(chance.uniform(0, 5 * arguments.span))
        victim = chance.choice(fresh)
        seen.update(workers)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        look(broken)
        moments.append({"rank": fresh.index(victim), "checkpoint": max((int(p.name) for p in checkpoints(broken)), default=0)})
        print(json.dumps(moments[-1]), flush=True)
    code = process.wait()
    look(broken)
    a, b = losses(whole), losses(broken)
    report = {
        "strategy": arguments.strategy,
        "kills": len(moments),
        "exit": code,
        "steps": len(b),
        "largest difference": max(abs(x - y) for x, y in zip(a, b, strict=True)),
        "left over": [p.name for p in (broken / "checkpoints").glob(".*")],
    }
    print(json.dumps(report, indent=1))
    if report["kills"] < arguments.kills or code or report["largest difference"] or report["left over"]:
        raise SystemExit("not as it must be, or too few steps for so many kills")


if __name__ == "__main__":
    main()
