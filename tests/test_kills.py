"""A training run whose processes are killed at random moments, again and again, has the losses of an unbroken one.

Two gloo processes, restarted by torchrun after each kill -9. After every kill all files under final names must be whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pairs import latent_folder
from test_scale import config, launch, losses

from unidiffuser.training.saving import checkpoints

KILLS = int(os.environ.get("KILLS", "2"))  # a long run takes 20 and more, of DDP as well
STEPS = 150 * KILLS  # enough that the run outlives the kills
SPAN = 1  # seconds after a checkpoint in which a kill falls


def whole_files(out: Path) -> None:
    """Everything under a final name can be read."""
    for folder in checkpoints(out):
        json.loads((folder / "run.json").read_text())
        parts = sorted(path.name for path in folder.iterdir())
        assert ".metadata" in parts, (folder, parts)
        assert sum(name.endswith(".distcp") for name in parts) == 2, (folder, parts)
    for name in ("config.json", "speed.json"):
        if (out / name).is_file():
            json.loads((out / name).read_text())


def kill_at_random(process: subprocess.Popen, out: Path, kills: int) -> int:
    """Kill one of the two training processes, `kills` times; how often it was done before the run ended."""
    chance, seen, done = random.Random(0), set[int](), 0
    while done < kills and process.poll() is None:
        workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        fresh = [pid for pid in workers if pid not in seen]
        if len(fresh) < 2:
            time.sleep(0.2)
            continue
        if chance.random() < 0.8:  # while it trains or writes; else while it starts
            before = checkpoints(out)
            while process.poll() is None and checkpoints(out) == before:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, SPAN))
        else:
            time.sleep(chance.uniform(0, 5 * SPAN))
        seen.update(workers)
        try:
            os.kill(chance.choice(fresh), signal.SIGKILL)
        except ProcessLookupError:
            continue
        whole_files(out)
        done += 1
    return done


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp"] if KILLS < 10 else ["ddp", "fsdp"])
def test_kills_change_no_loss(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "latents").mkdir()
    shards = latent_folder(tmp_path / "latents")
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 16, "save_every": 5, "strategy": strategy}
    for name, restarts in (("whole", 0), ("broken", KILLS + 1)):
        process = launch(
            config(shards, tmp_path / name, **settings), 2, f"--max-restarts={restarts}", output=subprocess.DEVNULL
        )
        if restarts:
            assert kill_at_random(process, tmp_path / name, KILLS) == KILLS, "the run ended before all kills"
        assert process.wait() == 0
    whole_files(tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert not list((tmp_path / "broken/checkpoints").glob(".*"))
