"""Start-up costs: import, loading, first results and peak memory, each in a fresh process (Linux)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

_HEAD = "import json, time; start = time.perf_counter(); "
# NOTE: resource.getrusage includes the memory of the parent, which a child has until it executes another program.
_TAIL = (
    "; seconds = time.perf_counter() - start; status = open('/proc/self/status').read(); "
    "print(json.dumps({'seconds': seconds, 'rss_mb': int(status.split('VmHWM:')[1].split()[0]) / 1024}))"
)
PROGRAMS = {
    "import": "import unidiffuser",
    "import, diffusers": "from diffusers import UniDiffuserPipeline",
    "load": "import unidiffuser; unidiffuser.load({model!r})",
    "first picture": "import unidiffuser; unidiffuser.load({model!r}, device={device!r}).text_to_image('red apple', steps=20)",
    "first picture, diffusers": (
        "import unidiffuser; from benchmarks.peers import Peer; "
        "Peer(unidiffuser.load({model!r}, device={device!r})).text_to_image(['red apple'], 20, 4.0)"
    ),
    "first caption": (
        "import unidiffuser; from benchmarks.tasks import PICTURE; "
        "unidiffuser.load({model!r}, device={device!r}).image_to_text(PICTURE, steps=20)"
    ),
}


def measure(model: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each program: name, median seconds, largest peak resident memory in MB."""
    rows = []
    for name, program in PROGRAMS.items():
        code = _HEAD + program.format(model=model, device=device) + _TAIL
        found = []
        for _ in range(repeats):
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = statistics.median(row["seconds"] for row in found)
        rows.append({"what": name, "seconds": seconds, "rss_mb": max(row["rss_mb"] for row in found)})
    return rows
