"""What `fuzz.py` mutates: for each kind a function that prepares a folder and returns a trial of one mutant."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz_mutations import (
    PAYLOAD,
    json_text,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_text,
)

Trial = Callable[[random.Random], None]
OPTIONS: dict[str, Any] = {"steps": 1, "seed": 0}


def use(path: Path) -> None:
    """Load all parts of a checkpoint and make a picture and its caption."""
    import unidiffuser

    model = unidiffuser.load(path, device="cpu", dtype="float32")
    for part in ("net", "text_encoder", "image_token_encoder", "autoencoder", "captioner"):
        getattr(model, part)
    model.image_to_text(model.text_to_image("a red cat", **OPTIONS)[0], **OPTIONS)


def own_checkpoint(folder: Path) -> Trial:
    from tiny import write_tiny_checkpoint

    path = folder / "model.safetensors"
    write_tiny_checkpoint(path)
    data = path.read_bytes()

    def trial(rng: random.Random) -> None:
        path.write_bytes(mutated_safetensors(data, rng, ("config", "config", "config", "clip_tokenizer", "gpt2_tokenizer")))
        use(path)

    return trial


def _mutated_zip(data: bytes, rng: random.Random) -> bytes:
    """A file of torch.save with another pickle, a pickle that runs a command, or other bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    out, payload = io.BytesIO(), rng.random() < 0.1
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = PAYLOAD if payload else mutated_bytes(content, rng)
            elif rng.random() < 0.02:
                content = mutated_bytes(content, rng)
            target.writestr(name, content)
    return out.getvalue()


def _small_layouts() -> Any:
    from layouts import CONFIG
    from tiny import tokenizer_specs

    specs = tokenizer_specs()
    sizes = [len(specs[name]["vocab"]) for name in ("clip_tokenizer", "gpt2_tokenizer")]  # type: ignore[arg-type]
    text = CONFIG.clip_text | {"vocab_size": sizes[0], "bos_token_id": sizes[0] - 2, "eos_token_id": sizes[0] - 1}
    caption = replace(CONFIG.caption, gpt2=CONFIG.caption.gpt2 | {"vocab_size": sizes[1]}, stop_token_id=sizes[1] - 1)
    return replace(CONFIG, clip_text=text, caption=caption), specs


def _one_file(folder: Path, names: list[str]) -> Trial:
    """Mutates one of the files of a folder at a time and loads the folder."""
    whole = {name: (folder / name).read_bytes() for name in names}

    def trial(rng: random.Random) -> None:
        name = rng.choice(names)
        data = whole[name]
        if rng.random() < 0.1:
            (folder / name).unlink()
        elif name.endswith(".json") and rng.random() < 0.8:
            (folder / name).write_text(json_text(mutated_json(json.loads(data), rng)), "utf-8")
        elif name.endswith((".pth", ".bin")):
            (folder / name).write_bytes(_mutated_zip(data, rng))
        elif name.endswith(".safetensors"):
            (folder / name).write_bytes(mutated_safetensors(data, rng, ()))
        else:
            (folder / name).write_bytes(mutated_bytes(data, rng))
        try:
            use(folder)
        finally:
            (folder / name).write_bytes(data)

    return trial


def diffusers_folder(folder: Path) -> Trial:
    from layouts import write_diffusers

    config, specs = _small_layouts()
    write_diffusers(folder, config)
    for place, name in (("clip_tokenizer", "clip_tokenizer"), ("text_tokenizer", "gpt2_tokenizer")):
        shutil.rmtree(folder / place)
        (folder / place).mkdir()
        (folder / place / "vocab.json").write_text(json.dumps(specs[name]["vocab"]))
        (folder / place / "merges.txt").write_text("#version: 0.2\na b\n" if place == "x" else "#version: 0.2\n")
    fast = {"model": {"vocab": specs["gpt2_tokenizer"]["vocab"], "merges": []}, "added_tokens": []}
    (folder / "text_tokenizer/vocab.json").unlink()
    (folder / "text_tokenizer/tokenizer.json").write_text(json.dumps(fast))
    from safetensors import safe_open

    stem = folder / "unet/diffusion_pytorch_model.safetensors"
    with safe_open(stem, framework="pt") as file:
        shards = dict.fromkeys(file.keys(), "part-1.safetensors")
    stem.rename(folder / "unet/part-1.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".txt")]
    names = [name for name in names if "scheduler" not in name and "model_index" not in name] * 3
    names += [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.safetensors"))]
    return _one_file(folder, names)


def original_folder(folder: Path) -> Trial:
    from layouts import write_original

    write_original(folder)
    suffixes = (".pth", ".json", ".safetensors")
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.suffix in suffixes]
    names += 2 * [name for name in names if name.endswith(".pth")]
    return _one_file(folder, names)


def picture(folder: Path) -> Trial:
    from pairs import EPS, encoded
    from pairs import picture as drawn
    from PIL import Image

    from unidiffuser.media.images import open_image, readable_formats

    image = drawn(3, 40)[0]
    images = (image, image.convert("L"), image.convert("P"), image.convert("RGBA"), image.convert("1"))
    seeds = [EPS]
    for kind in readable_formats():
        for one in images:
            try:
                seeds.append(encoded(one, kind))
            except (OSError, ValueError, KeyError):
                continue
    frames = io.BytesIO()
    image.save(frames, "GIF", save_all=True, append_images=[image.rotate(90)], duration=10)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    image.save(turned, "JPEG", exif=exif)
    seeds += [frames.getvalue(), turned.getvalue()]

    def trial(rng: random.Random) -> None:
        path = folder / rng.choice(("a.png", "a.jpg", "a.webp", "a.gif"))
        path.write_bytes(mutated_bytes(rng.choice(seeds), rng, rng.choice((64, 1 << 30))))
        open_image(path)

    return trial


def captions(folder: Path) -> Trial:
    """Pictures with metadata.jsonl, with text files, COCO's annotations, and tar shards, read as `data encode` reads them."""
    from pairs import encoded, tar_samples, write_tar
    from pairs import picture as drawn

    from unidiffuser.data.sources import find_parts

    listed, beside, coco, shards = (folder / name for name in ("listed", "beside", "coco", "shards"))
    for place in (listed, beside, coco, shards):
        place.mkdir()
    for number in range(3):
        image, caption = drawn(number, 16)
        for place in (listed, beside, coco):
            (place / f"{number}.png").write_bytes(encoded(image))
        (beside / f"{number}.txt").write_text(caption)
    rows = [
        {"file_name": f"{k}.png", "text": [f"a {k}", "b"] if k else "a cat", "label": "x", "split": "train"} for k in range(3)
    ]
    annotations = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(3)],
        "annotations": [{"image_id": k, "caption": f"a {k}"} for k in range(3)],
    }
    write_tar(shards / "0.tar", tar_samples(0, 3))
    tar = (shards / "0.tar").read_bytes()

    def trial(rng: random.Random) -> None:
        kind, source, notes = rng.randrange(4), listed, None
        if kind == 0:
            lines = [json_text(mutated_json(row, rng)) if rng.random() < 0.5 else json.dumps(row) for row in rows]
            if rng.random() < 0.4:
                lines = [mutated_text(line, rng) for line in lines]
            (listed / "metadata.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        elif kind == 1:
            source = beside
            (beside / "1.txt").write_bytes(mutated_bytes(mutated_text("a red cat", rng).encode("utf-8", "replace"), rng))
        elif kind == 2:
            source, notes = coco, coco / "notes.json"
            text = json_text(mutated_json(annotations, rng))
            notes.write_bytes(mutated_bytes(text.encode(), rng) if rng.random() < 0.3 else text.encode())
        else:
            source = shards
            (shards / "0.tar").write_bytes(mutated_bytes(tar, rng, rng.choice((512, 2048, 1 << 30))))
        for part in find_parts(source, notes):
            for pair in part.read():
                if pair.has_picture and not pair.problem:
                    try:
                        pair.image()
                    except (ValueError, OSError):
                        continue

    return trial


def settings(folder: Path) -> Trial:
    """YAML files of training and evaluation."""
    import yaml

    from unidiffuser.evaluation.config import EvaluationConfig
    from unidiffuser.training.config import TrainConfig

    root = Path(__file__).resolve().parents[1] / "unidiffuser"
    files = [(TrainConfig, path.read_text()) for path in sorted((root / "training/configs").rglob("*.yaml"))]
    files += [(EvaluationConfig, path.read_text()) for path in sorted((root / "evaluation/configs").rglob("*.yaml"))]

    def trial(rng: random.Random) -> None:
        kind, text = rng.choice(files)
        if rng.random() < 0.5:
            text = mutated_text(text, rng)
        else:
            values = mutated_json(json.loads(json.dumps(yaml.safe_load(text), default=str)), rng)
            text = json_text(values) if rng.random() < 0.5 else yaml.safe_dump(values)
        (folder / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        kind.from_file(folder / "a.yaml")

    return trial


def training_state(folder: Path) -> Trial:
    import torch

    from unidiffuser.distributed import World
    from unidiffuser.training import saving
    from unidiffuser.training.average import Average

    def parts() -> tuple[torch.nn.Module, list[torch.optim.Optimizer], Average]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        return model, [torch.optim.AdamW(model.parameters())], Average(model, 0.9)

    alone, run = World(0, 1, torch.device("cpu")), {"stage": "x", "batch_size": 2, "seed": 0, "data": "d"}
    model, optimizers, average = parts()
    model(torch.ones(1, 4)).sum().backward()
    optimizers[0].step()
    place = saving.save(folder, 3, model, optimizers, average, run, 2, alone)
    whole = {path.name: path.read_bytes() for path in place.iterdir()}

    def trial(rng: random.Random) -> None:
        name = rng.choice(sorted(whole))
        data = whole[name]
        if name == "run.json" and rng.random() < 0.7:
            (place / name).write_text(json_text(mutated_json(json.loads(data), rng)))
        elif rng.random() < 0.05:
            (place / name).write_bytes(PAYLOAD)
        else:
            (place / name).write_bytes(mutated_bytes(data, rng, rng.choice((300, 1 << 30))))
        try:
            saving.resume(folder, *parts(), run, alone)
        finally:
            (place / name).write_bytes(data)

    return trial


def path_text(folder: Path) -> Trial:
    from unidiffuser.path import SPACINGS, NoisePath

    seeds = ("1000,1000 400,0 0,0", "0,1000 0,0", "1000,0 0,0", "1000,1000 1000,0 0,0", "1e3,.5e3;0,0", "(1000, 1000) (0, 0)")

    def trial(rng: random.Random) -> None:
        points: Any = mutated_text(rng.choice(seeds), rng)
        if rng.random() < 0.3:
            points = mutated_json([[1000, 1000], [400, 0], [0, 0]], rng)
        path = NoisePath.from_points(points, rng.choice((1, 2, 7, 50)), rng.choice(list(SPACINGS)))
        if path.steps < 1:
            raise AssertionError("a path without steps")

    return trial


def lora(folder: Path) -> Trial:
    import torch
    from tiny import write_tiny_checkpoint

    import unidiffuser
    from unidiffuser.runtime.lora import Change, layers_of, write_lora

    write_tiny_checkpoint(folder / "model.safetensors")
    model = unidiffuser.load(folder / "model.safetensors", device="cpu", dtype="float32")
    layers = {part: layers_of(model.checkpoint.state_dict(part)) for part in ("uvit", "caption")}
    changes: dict[str, dict[str, Change]] = {}
    for part, found in layers.items():
        for name, shape in [(n, s) for n, s in found.items() if "attn" in n][:2]:
            rows, columns = shape[::-1] if part == "caption" else shape
            changes.setdefault(part, {})[name] = Change(torch.ones(2, columns), torch.ones(rows, 2))
    write_lora(folder / "a.safetensors", changes, {"words": ["red cat"], "steps": 3})
    data = (folder / "a.safetensors").read_bytes()
    plain = {f"{name}.{k}": torch.ones(2, 3) for name in ("diffusion_model.in_blocks.0.attn.qkv",) for k in ("lora_A.weight",)}
    saved = io.BytesIO()
    torch.save(plain | {"diffusion_model.in_blocks.0.attn.qkv.lora_B.weight": torch.ones(3, 2)}, saved)

    def trial(rng: random.Random) -> None:
        path = folder / "b.safetensors"
        if rng.random() < 0.8:
            path.write_bytes(mutated_safetensors(data, rng, ("unidiffuser_lora",)))
        else:
            path.write_bytes(_mutated_zip(saved.getvalue(), rng))
        model.load_lora(path)
        model.unload_lora()

    return trial


def latent_shards(folder: Path) -> Trial:
    import torch
    from pairs import latent_folder

    from unidiffuser.data.shards import MANIFEST, LatentShards

    latent_folder(folder, shards=2, per_shard=3)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def trial(rng: random.Random) -> None:
        name = rng.choice((MANIFEST, *sorted(whole)))
        if name == MANIFEST:
            text = json_text(mutated_json(json.loads(whole[name]), rng)).encode()
            (folder / name).write_bytes(mutated_bytes(text, rng) if rng.random() < 0.2 else text)
        else:
            data = mutated_safetensors(whole[name], rng, ("notes",))
            size = len(whole[name])
            (folder / name).write_bytes(data if rng.random() < 0.3 else data[:size] + bytes(max(0, size - len(data))))
        try:
            shards = LatentShards(folder)
            shards.read(shards.order(4, 0, 0))
            shards.read(torch.arange(min(len(shards), 100)))
            shards.name_of(0)
        finally:
            (folder / name).write_bytes(whole[name])

    return trial


def prompt(folder: Path) -> Trial:
    from tiny import write_tiny_checkpoint

    import unidiffuser
    from unidiffuser.checkpoints.tokenizers import BytePairTokenizer, clip_spec, gpt2_spec

    write_tiny_checkpoint(folder / "model.safetensors")
    model = unidiffuser.load(folder / "model.safetensors", device="cpu", dtype="float32")
    published = [BytePairTokenizer.from_spec(spec) for spec in (clip_spec(), gpt2_spec())]
    seeds = (
        "a red cat",
        "",
        "wolf, watercolour",
        "(red:1.3) [blue|green]",
        "<|startoftext|> <|endoftext|> <|EOS|>",
        "🍎👩🏽‍🚀 漢字",
    )

    def trial(rng: random.Random) -> None:
        text: Any = mutated_text(rng.choice(seeds), rng)
        if rng.random() < 0.1:
            text = mutated_json([text], rng)
        if isinstance(text, str):
            model.vary_text(text, **OPTIONS)
        model.text_to_image(text, negative=text if rng.random() < 0.3 else None, **OPTIONS)
        for tokenizer in published:
            if isinstance(text, str):
                tokenizer.decode(tokenizer.encode(text.encode("utf-8", "replace").decode()))

    return trial


def table(folder: Path) -> Trial:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from unidiffuser.data.filter import PRESETS, filter_tables

    columns: dict[str, Any] = {
        "URL": ["http://a/b.jpg"] * 4, "TEXT": ["a cat", None, "", "x" * 100], "WIDTH": [512, None, 0, 2000],
        "HEIGHT": [512, 3, 0, 1], "similarity": [0.3, None, float("nan"), 1.0], "punsafe": [0.1] * 4,
        "pwatermark": [0.1] * 4, "AESTHETIC_SCORE": [6.0] * 4,
    }  # fmt: skip
    odd = ([{"a": 1}] * 4, [b"x"] * 4, [[1]] * 4, ["x"] * 4, [None] * 4, [True] * 4, [2**62] * 4)

    def trial(rng: random.Random) -> None:
        source, out = folder / "source", folder / "out"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        source.mkdir()
        chosen = dict(columns)
        for name in rng.sample(list(chosen), rng.choice((0, 1, 2))):
            chosen[name] = rng.choice(odd)
        if rng.random() < 0.1:
            del chosen[rng.choice(list(chosen))]
        pq.write_table(pa.table(chosen), source / "a.parquet")
        if rng.random() < 0.6:
            data = (source / "a.parquet").read_bytes()
            (source / "a.parquet").write_bytes(mutated_bytes(data, rng))
        filter_tables(source, out, rng.choice(list(PRESETS.values())))

    return trial


def saved_model(folder: Path) -> Trial:
    """Files of ComfyUI's ModelSave in Load UniDiffuser; runs in ComfyUI's interpreter, which need not have diffusers.

    The environment variable TINY names a file that `python tests/host/tiny.py FILE` wrote.
    """
    shutil.copy(os.environ["TINY"], folder / "tiny.safetensors")
    from inside import NAME, load_pack, start_host

    start_host()
    load_pack()
    import folder_paths
    import torch
    from safetensors.torch import save_file

    folder_paths.add_model_folder_path("checkpoints", str(folder), is_default=True)

    def module(name: str) -> Any:
        return importlib.import_module(f"{NAME}.{name}")

    module("nodes.folders").register()
    loader, saved, network = (module(f"nodes.{name}") for name in ("nodes_loader", "saved_models", "host_network"))
    checkpoint = module("unidiffuser.checkpoints.checkpoint").load_checkpoint(folder / "tiny.safetensors")
    caption = checkpoint.state_dict("caption")
    prefix = {key: caption[f"encode_prefix.{key}"] for key in ("weight", "bias")}
    weights = {saved.PREFIX + k: v.contiguous() for k, v in network.host_keys(checkpoint.state_dict("uvit"), prefix).items()}
    origin = {"name": "tiny.safetensors", "config": checkpoint.config.to_dict()}
    path = folder / "saved.safetensors"

    def trial(rng: random.Random) -> None:
        action, entry = rng.random(), json.dumps(origin).encode()
        if action < 0.6:
            entry = json_text(mutated_json(origin, rng)).encode()
        elif action < 0.75:
            entry = mutated_bytes(entry, rng)
        tensor: Any = torch.tensor(list(entry), dtype=torch.uint8)
        if rng.random() < 0.1:
            tensor = rng.choice(
                (tensor.float(), tensor.reshape(1, -1), tensor[:0], torch.tensor(1), torch.zeros(3, dtype=torch.int64))
            )
        kept = {k: v for k, v in weights.items() if rng.random() > 0.02} if rng.random() < 0.1 else weights
        save_file({**kept, saved.KEY: tensor.contiguous()}, path)
        if action > 0.85:
            path.write_bytes(mutated_safetensors(path.read_bytes(), rng, ()))
        loader.LoadUniDiffuser.execute("saved.safetensors")

    return trial


KINDS: dict[str, Callable[[Path], Trial]] = {
    "checkpoint": own_checkpoint,
    "diffusers": diffusers_folder,
    "original": original_folder,
    "picture": picture,
    "captions": captions,
    "settings": settings,
    "training_state": training_state,
    "path": path_text,
    "lora": lora,
    "latent_shards": latent_shards,
    "prompt": prompt,
    "table": table,
    "saved_model": saved_model,
}
HOST = ("saved_model",)
"""Kinds that need ComfyUI."""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
