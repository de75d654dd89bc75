"""From LAION's columns to a falling loss, with a broken picture in ten, against a web server of our own.

A table of LAION's columns names pictures on a local server; a tenth of those that pass the filter are broken, in eight ways.
Filter, img2dataset, encode (killed twice) and training run as commands. Every count is compared with one made independently:
the filter's in plain Python on the rows, the others from what the server was told to do.
"""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "brown", "pink", "gray", "black", "gold")
SHAPES = ("circle", "square", "bar", "ring")
BROKEN = ("missing", "error", "cut off", "page", "empty", "bomb", "noise", "forbidden")
SIDE, LEAST = 128, 48  # pixels: of the latents' pictures, and the smallest that is encoded


def picture(number: int) -> tuple[bytes, str, bool]:
    """File, caption, and whether it is too small to be encoded."""
    chance = random.Random(number)
    colour, shape = chance.choice(COLOURS), chance.choice(SHAPES)
    small = number % 50 == 7
    width, height = (40, 44) if small else (chance.randint(140, 300), chance.randint(140, 300))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    x, y, r = width / 2, height / 2, min(width, height) * chance.uniform(0.25, 0.4)
    box = (x - r, y - r / (3 if shape == "bar" else 1), x + r, y + r / (3 if shape == "bar" else 1))
    if shape == "ring":
        draw.ellipse(box, outline=colour, width=max(3, int(r / 4)))
    else:
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    image.save(file, ("JPEG", "PNG", "WEBP")[number % 3])
    caption = f"{colour} {shape}" if number % 100 else f"{colour} {shape} " + "and so on " * 1000
    return file.getvalue(), caption, small


def bomb() -> bytes:
    """The head of a PNG of 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100000))) + chunk(b"IEND", b"")


class Handler(BaseHTTPRequestHandler):
    """/good/17 is picture 17; /missing/17 and the like break in their way."""

    def do_GET(self) -> None:
        kind, number = self.path.strip("/").split("/")
        data = picture(int(number))[0]
        if kind in ("missing", "error"):
            self.send_error(404 if kind == "missing" else 500)
            return
        data = {"page": b"<html>sold</html>", "empty": b"", "bomb": bomb(), "noise": random.Random(number).randbytes(900)}.get(
            kind, data
        )
        self.send_response(200)
        if kind == "forbidden":
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut off" else data)

    def log_message(self, *_: Any) -> None:
        pass


def tables(folder: Path, port: int, count: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Write three tables: ``count`` rows that pass the aesthetics preset, half as many again that do not.

    Returns:
        the rows, and how many of the first kind are broken in each way.
    """
    chance = random.Random(0)
    rows, broken = [], Counter[str]()
    for number in range(count + count // 2):
        kind = BROKEN[number // 10 % len(BROKEN)] if number % 10 == 3 else "good"
        row: dict[str, Any] = {
            "URL": f"http://127.0.0.1:{port}/{kind}/{number}", "TEXT": picture(number)[1],
            "WIDTH": chance.randint(512, 2000), "HEIGHT": chance.randint(512, 2000), "similarity": chance.uniform(0.28, 0.4),
            "LANGUAGE": "en", "hash": chance.getrandbits(60), "pwatermark": chance.uniform(0, 0.79),
            "punsafe": chance.uniform(0, 0.49), "AESTHETIC_SCORE": chance.uniform(5, 9),
        }  # fmt: skip
        if number >= count:  # one thing or two are wrong with it
            bad = {"URL": "ftp://x", "TEXT": "  ", "WIDTH": 200, "HEIGHT": None, "LANGUAGE": "de", "pwatermark": 0.95,
                   "punsafe": 0.7, "AESTHETIC_SCORE": chance.choice([4.2, None])}  # fmt: skip
            row |= {name: bad[name] for name in chance.sample(list(bad), chance.choice([1, 2]))}
        elif kind != "good":
            broken[kind] += 1
        rows.append(row)
    chance.shuffle(rows)
    folder.mkdir(parents=True)
    third = -(-len(rows) // 3)
    for part in range(3):
        pq.write_table(
            pa.Table.from_pylist(rows[part * third : (part + 1) * third]), folder / f"part-{part:05d}.snappy.parquet"
        )
    return rows, broken


def first_broken_rule(row: dict[str, Any]) -> str | None:
    """Of the preset "aesthetics-512", written down a second time."""
    if not row["URL"].startswith("http"):
        return "url"
    if not row["TEXT"].strip():
        return "min_caption"
    if row["LANGUAGE"] != "en":
        return "language"
    if row["WIDTH"] is None or row["HEIGHT"] is None or min(row["WIDTH"], row["HEIGHT"]) < 512:
        return "min_side"
    if row["pwatermark"] > 0.8:
        return "max_watermark"
    if row["punsafe"] > 0.5:
        return "max_unsafe"
    return "min_aesthetic" if row["AESTHETIC_SCORE"] is None or row["AESTHETIC_SCORE"] < 5 else None


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "unidiffuser", *map(str, arguments)]


def rehearse(out: Path, img2dataset: str, count: int, steps: int) -> dict[str, Any]:
    """The whole run; a dict of counted and expected numbers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows, broken = tables(out / "laion", server.server_port, count)
    report: dict[str, Any] = {}

    subprocess.run(command("data", "filter", out / "laion", out / "kept", "--preset", "aesthetics-512"), check=True)
    counted = json.loads((out / "kept/filter.json").read_text())["count"]
    reasons = Counter(first_broken_rule(row) for row in rows)
    expected = {"read": len(rows), "kept": reasons.pop(None), "dropped": dict(reasons)}
    counted = {"read": counted["read"], "kept": counted["kept"], "dropped": {k: v for k, v in counted["dropped"].items() if v}}
    report["filter"] = {"counted": counted, "expected": expected}

    options = ["--image-size", str(SIDE), "--per-shard", "200", "--processes", "2", "--threads", "16"]
    shown = subprocess.run(
        command("data", "download", out / "kept", out / "shards", *options), check=True, capture_output=True, text=True
    ).stdout
    arguments = [img2dataset, *shlex.split(shown.replace("\\\n", " "))[1:]]
    with (out / "img2dataset.log").open("w") as log:
        subprocess.run(arguments, check=True, stdout=log, stderr=log, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"})
    server.shutdown()
    stats = [json.loads(path.read_text()) for path in sorted((out / "shards").glob("*_stats.json"))]
    results: Counter[str] = Counter()
    for path in sorted((out / "shards").glob("*.parquet")):
        for row in pq.read_table(path, columns=["url", "status"]).to_pylist():
            if row["status"] != "success":
                results[row["url"].split("/")[3]] += 1
    report["download"] = {
        "counted": {"successes": sum(s["successes"] for s in stats), "failed": dict(sorted(results.items()))},
        "expected": {"successes": count - sum(broken.values()), "failed": dict(sorted(broken.items()))},
        "shards": len(stats),
    }

    encode = command("data", "encode", out / "shards", out / "latents", "--min-side", str(LEAST), "--device", "cpu")
    kills = 0
    while kills < 2:
        done = len(list((out / "latents").glob("*.safetensors")))
        with (out / "encode.log").open("a") as log:
            process = subprocess.Popen(encode, stdout=log, stderr=log)
            while process.poll() is None and len(list((out / "latents").glob("*.safetensors"))) < done + 2:
                time.sleep(0.05)
            time.sleep(random.Random(kills).uniform(0, 1))
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
    between = {p.name: p.stat().st_mtime_ns for p in (out / "latents").glob("*.safetensors")}
    subprocess.run(encode, check=True)
    manifest = json.loads((out / "latents/manifest.json").read_text())
    good = [row for row in rows if first_broken_rule(row) is None and "/good/" in row["URL"]]
    small = sum(picture(int(row["URL"].split("/")[-1]))[2] for row in good)
    report["encode"] = {
        "counted": {k: manifest[k] for k in ("read", "samples", "dropped", "damaged")},
        "expected": {"read": len(good), "samples": len(good) - small, "dropped": {"too small": small}, "damaged": {}},
        "kills": kills,
        "done before the last run": len(between),
        "done twice": sum((out / "latents" / name).stat().st_mtime_ns != then for name, then in between.items()),
    }

    sizes = {
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 2,
        "patch_size": 2,
        "text_dim": 64,
        "num_text_tokens": 12,
        "clip_img_dim": 128,
    }
    run = {
        "stage": "latents", "out": str(out / "run"), "steps": steps, "batch_size": 32, "learning_rate": 1e-3,
        "warmup_steps": 20, "precision": "no", "save_every": 100, "sample_every": steps,
        "options": {"latents": str(out / "latents"), "checkpoint": "emoji", "uvit": sizes},
    }  # fmt: skip
    (out / "run.yaml").write_text(yaml.safe_dump(run))
    subprocess.run(command("train", out / "run.yaml"), check=True, stderr=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in (out / "run/losses.jsonl").read_text().splitlines()]
    tenth = max(1, steps // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    report["train"] = {"steps": len(losses), "first tenth": round(first, 4), "last tenth": round(last, 4)}
    agreed = all(part["counted"] == part["expected"] for part in report.values() if "counted" in part)
    report["agreed"] = agreed and last < first and report["encode"]["done twice"] == 0
    return report
