"""Start-up costs: the first results of a fresh process by part, and peak memory (Linux)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

_HEAD = (
    "import json, time; laps, last = {}, time.perf_counter()\n"
    "def lap(name):\n"
    "    global last\n"
    "    now = time.perf_counter(); laps[name] = now - last; last = now\n"
)
# NOTE: resource.getrusage includes the memory of the parent, which a child has until it executes another program.
_TAIL = (
    "\nstatus = open('/proc/self/status').read()\n"
    "print(json.dumps({'laps': laps, 'rss_mb': int(status.split('VmHWM:')[1].split()[0]) / 1024}))"
)
_OURS = "import torch; lap('torch')\nimport unidiffuser; model = unidiffuser.load({model!r}, device={device!r}); lap('model')\n"
_PARTS = (
    f"{_OURS}model.encode_texts(['red apple']); lap('text encoder')\n"
    "model.net; lap('network')\n"
    "model.autoencoder; lap('autoencoder')\n"
)
PROGRAMS = {
    "picture": f"{_PARTS}model.text_to_image('red apple', steps=20); lap('picture')",
    "picture, fast": f"{_PARTS}model.text_to_image('red apple', preset='fast'); lap('picture')",
    "picture, diffusers": (
        "import torch; lap('torch')\n"
        "from diffusers import UniDiffuserPipeline; lap('pipeline')\n"
        "import unidiffuser; from benchmarks.peers import Peer, plain_checkpoint\n"
        "made = plain_checkpoint(unidiffuser.load({model!r}).checkpoint)\n"
        "peer = Peer(unidiffuser.UniDiffuser(made, {device!r})); lap('parts')\n"
        "peer.text_to_image(['red apple'], 20, 4.0); lap('picture')"
    ),
    "caption": (
        f"{_OURS}from benchmarks.tasks import PICTURE\n"
        "model.image_to_text(PICTURE, steps=20); lap('caption')"
    ),
}  # fmt: skip
"""The last entry of each is the result itself; all but diffusers' are this library's."""


def measure(model: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each program: name, median seconds of its parts and in all, largest peak resident memory in MB."""
    rows = []
    for name, program in PROGRAMS.items():
        code = _HEAD + program.format(model=model, device=device) + _TAIL
        found = []
        for _ in range(repeats):
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        parts = {part: statistics.median(row["laps"][part] for row in found) for part in found[0]["laps"]}
        seconds = statistics.median(sum(row["laps"].values()) for row in found)
        rows.append({"what": name, "seconds": seconds, "parts": parts, "rss_mb": max(row["rss_mb"] for row in found)})
    return rows
