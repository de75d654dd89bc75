"""Mutations of JSON values, texts and bytes for `fuzz.py`, each a function of a random generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

DEEP, HUGE = "@@deep@@", "@@huge@@"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, float("nan"), float("inf"), 1e308,
    "", "a", "0", "é\u2028\x00", "x" * 5000, "../../../../etc/passwd", "/dev/zero", "os.system", "__reduce__", DEEP, HUGE,
    [], {}, [[]], [None], {"a": 1}, [1, 2], [0] * 3000, ["a", "b"], {"": {}}, {"vocab": {}, "merges": []},
)  # fmt: skip
CHARACTERS = "\x00\n\r\t \x0b\x0c\x1c\x85\u2028\ufeff\ud800\udcff\u0301\u200d🍎é漢ـ0123456789-+.,;:#%&*!?'\"\\/(){}[]<>|=aZ"
PAYLOAD = b"cos\nsystem\n(S'true'\ntR."  # a pickle that runs a command


def json_text(value: Any) -> str:
    """JSON with the places of `DEEP` and `HUGE` filled: 100,000 brackets, and a number of 5,000 digits."""
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).replace(json.dumps(HUGE), "9" * 5000)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys that lead to each value below `value`; only the first 30 of long lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for number, (key, inner) in enumerate(items):
        if number < 30:
            found += [(*path, key), *places(inner, (*path, key))]
    return found


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, moved, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (found := places(value)):
            break
        *way, key = rng.choice(found)
        parent = value
        for step in way:
            parent = parent[step]
        action = rng.randrange(6)
        if action <= 2:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif action == 3 and isinstance(parent[key], (int, float)):
            parent[key] = rng.choice((parent[key] * 2, parent[key] + 1, -parent[key], parent[key] * 1000, parent[key] / 2))
        elif action == 4 or not isinstance(parent, dict):
            del parent[key]
        else:
            parent[rng.choice(("x", "", "a.b", str(key) + "s"))] = parent.pop(key)
    return value


def mutated_bytes(data: bytes, rng: random.Random, most: int = 1 << 30) -> bytes:
    """A copy with bytes changed, cut out, repeated, or filled with a value; only among the first `most`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = max(1, min(len(out), most))
        at = rng.randrange(end)
        size = min(rng.choice((1, 1, 2, 4, 8, 64, 1024)), end - at)
        action = rng.randrange(7)
        if action == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            out[at : at + size] = bytes([rng.choice((0, 255, 127, 128))]) * size
        elif action == 2:
            del out[at : at + size]
        elif action == 3:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 100))
        elif action == 4:
            out[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)))
        elif action == 5:
            del out[at:]
        else:
            out[at : at + size] = rng.randbytes(size)
    return bytes(out)


def mutated_text(text: str, rng: random.Random) -> str:
    """A copy with characters replaced, inserted, removed or repeated."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(text) + 1)
        size = rng.choice((0, 1, 1, 3, 20))
        new = "".join(rng.choice(CHARACTERS) for _ in range(rng.choice((0, 1, 1, 3, 20))))
        if rng.random() < 0.1:
            new = text[at : at + 20] * rng.choice((2, 1000))
        text = text[:at] + new + text[at + size :]
    return text


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: str, tensors: bytes) -> bytes:
    """A safetensors file of a header as text."""
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + tensors


def mutated_safetensors(data: bytes, rng: random.Random, texts: tuple[str, ...]) -> bytes:
    """A safetensors file with another header: one of the JSON `texts` of its metadata, its entries, or its bytes.

    Args:
        data: the file.
        rng: the random generator.
        texts: names of the metadata that are JSON.
    """
    header, tensors = split_safetensors(data)
    metadata, action = header.get("__metadata__", {}), rng.random()
    if action < 0.6 and texts:
        name = rng.choice(texts)
        if rng.random() < 0.8:
            metadata[name] = json_text(mutated_json(json.loads(metadata[name]), rng))
        else:
            metadata[name] = mutated_text(metadata[name], rng).encode("utf-8", "replace").decode()
        return join_safetensors(json.dumps(header), tensors)
    if action < 0.85:
        return join_safetensors(json_text(mutated_json(header, rng)), tensors)
    return mutated_bytes(data, rng, 8 + len(json.dumps(header)) if rng.random() < 0.7 else len(data))
