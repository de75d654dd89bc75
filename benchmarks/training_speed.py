"""Training on two processes compared with one: equal losses, and the speed-up.

    python benchmarks/training_speed.py LATENTS OUT [--rounds 3]

LATENTS: a folder of `unidiffuser data encode`. First 50 steps in float32 with one process, with DDP and with FSDP2 on two, and
the largest difference between their losses. Then samples a second of one process pinned to one core against two processes on
two cores, alternating, as a quiet machine never is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

SIZES = {"embed_dim": 128, "depth": 4, "num_heads": 2, "patch_size": 2, "text_dim": 64, "num_text_tokens": 12,
         "clip_img_dim": 128}  # fmt: skip


def run(
    latents: Path, out: Path, processes: int, steps: int, batch_size: int, strategy: str = "ddp"
) -> tuple[list[float], dict[str, float]]:
    """Losses and rates of a fresh run."""
    shutil.rmtree(out, ignore_errors=True)
    values = {
        "stage": "latents", "out": str(out), "steps": steps, "batch_size": batch_size, "learning_rate": 1e-3, "warmup_steps": 5,
        "precision": "no", "save_every": steps, "sample_every": steps, "strategy": strategy,
        "options": {"latents": str(latents), "checkpoint": "emoji", "uvit": SIZES},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    train = ["-m", "unidiffuser", "train", str(config)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, *train] if processes > 1 else ["taskset", "-c", "0", sys.executable, *train]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    return losses, json.loads((out / "speed.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128, help="for the speed")
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.speed_only:
        one, _ = run(arguments.latents, arguments.out / "one", 1, 50, 32)
        for strategy in ("ddp", "fsdp"):
            two, _ = run(arguments.latents, arguments.out / strategy, 2, 50, 32, strategy)
            difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
            print(json.dumps({"strategy": strategy, "steps": len(two), "largest difference": difference}), flush=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(2 * arguments.rounds):
        processes = 1 + number % 2
        _, speed = run(arguments.latents, arguments.out / f"speed{processes}", processes, 14, arguments.batch_size)
        rates[processes].append(speed["samples_per_s"])
        print(json.dumps(rates), flush=True)
    ratio = statistics.median(rates[2]) / statistics.median(rates[1])
    print(json.dumps({"samples a second": rates, "ratio of medians": ratio}, indent=1))


if __name__ == "__main__":
    main()
