"""The pack's own cost inside a ComfyUI: its import, and KSampler against the bare network evaluations that it makes.

The program runs in the host's own interpreter and counts processor time, which a busy machine changes least.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, json, statistics, sys, time
sys.path.insert(0, sys.argv[1])
from inside import load_pack, start_host

start_host()
start = time.process_time()
extension = asyncio.run(load_pack().comfy_entrypoint())
asyncio.run(extension.on_load())
found = asyncio.run(extension.get_node_list())
importing = time.process_time() - start

import nodes, torch

loader = next(node for node in found if node.__name__ == "LoadUniDiffuser")
model, clip = loader.execute("emoji").args[:2]
net, inside, started = model.model.diffusion_model, [], []
net.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
net.register_forward_hook(lambda *_: inside.append(time.process_time() - started.pop()))
positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("red apple", ""))
latent = {"samples": torch.zeros(8, 4, 16, 16)}
report = {"import": importing}
for sampler, scheduler in (("euler", "simple"), ("dpmpp_2m", "normal")):
    ratios = []
    for number in range(6):
        inside.clear()
        start = time.process_time()
        with torch.inference_mode():  # as in the server
            nodes.common_ksampler(model, 0, 20, 4.0, sampler, scheduler, positive, negative, latent)
        if number:  # the first loads the model
            ratios.append((time.process_time() - start) / sum(inside))
    report[sampler] = statistics.median(ratios)
print(json.dumps(report))
"""


@pytest.mark.slow
def test_the_pack_costs_next_to_nothing_beside_the_network(host: tuple[Path, Path]) -> None:
    """About 0.06 s and 5 % on an idle machine."""
    folder, python = host
    command = [python, "-c", PROGRAM, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["import"] < 0.5
    assert report["euler"] < 1.15
    assert report["dpmpp_2m"] < 1.15
