"""Training from latent shards on several processes, growth to another size, and prompts shared by processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pairs import SIDE, TINY, latent_folder, picture, tar_samples, write_tar
from rounding import EXACT, assert_same
from safetensors.torch import load_file, save_file

from unidiffuser.training import objective
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.growth import grown
from unidiffuser.training.latent_stage import LatentStage
from unidiffuser.training.loop import train
from unidiffuser.training.network import example_cost
from unidiffuser.training.optimizers import make_optimizers
from unidiffuser.training.saving import checkpoints
from unidiffuser.uvit import UViT, UViTConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    return latent_folder(folder)


def config(shards: Path, out: Path, **values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 8, "batch_size": 6, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "no",
                                "save_every": 4, "sample_every": 100}  # fmt: skip
    options = {"latents": str(shards), "checkpoint": "emoji", "window": 2, "uvit": dict(TINY)}
    return TrainConfig("latents", str(out), options=options, **(defaults | values))


def launch(settings: TrainConfig, processes: int, *more: str, output: int = subprocess.PIPE) -> subprocess.Popen:
    """`torchrun -m unidiffuser train` with a config of its own."""
    path = Path(settings.out).with_suffix(".yaml")
    values = asdict(settings)
    path.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}))
    return torchrun(processes, *more, "-m", "unidiffuser", "train", str(path), output=output)


def torchrun(processes: int, *arguments: str, output: int = subprocess.PIPE) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out[-3000:]
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


# --- the stage -------------------------------------------------------------------------------------------------------


def test_passes_and_workers_change_nothing(shards, tmp_path):
    train(LatentStage(one := config(shards, tmp_path / "one")), one, progress=False)
    many = config(shards, tmp_path / "many", micro_batch=2, workers=2, checkpoint_activations=True, tensorboard=True)
    train(LatentStage(many), many, progress=False)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "many"), rtol=0, atol=1e-6)
    assert list((tmp_path / "many/tensorboard").glob("events*"))
    speed = json.loads((tmp_path / "many/speed.json").read_text())
    assert speed["tokens_per_s"] == pytest.approx(speed["samples_per_s"] * (3 + 12 + 1 + 16))
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]


def test_the_result_is_a_model(shards, tmp_path):
    import unidiffuser

    settings = config(shards, tmp_path / "run", steps=2)
    settings.options["sample_prompts"] = ["red apple"]
    train(LatentStage(settings), settings, progress=False)
    model = unidiffuser.load(tmp_path / "run/model.safetensors")
    assert model.text_to_image("red apple", steps=2)[0].size == (SIDE, SIDE)
    assert (tmp_path / "run/samples/0000002.png").is_file()


def test_labels_are_drawn_as_the_config_says(shards, tmp_path):
    settings = config(shards, tmp_path / "run")
    settings.options["logit_normal"] = [0.0, 1e-3]  # next to no width: the label where noise and signal are equally strong
    stage = LatentStage(settings)
    labels = stage.examples(torch.arange(8), list(range(8)))
    assert ((labels["t_img"] - 355).abs() <= 2).all()
    assert len(labels["t_text"].unique()) > 4


def test_muon_orthogonalises_in_the_blocks_and_adamw_moves_the_rest(shards, tmp_path):
    """First updates are known: AdamW's are signs, Muon's the gradient with all its singular values made (nearly) one."""
    settings = config(shards, tmp_path / "run", optimizer="muon", weight_decay=0.0)
    stage = LatentStage(settings)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    orthogonal = {}
    for name, p in stage.model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if ("blocks." in name or "mid_block" in name) and p.ndim == 2:
            u, values, v = torch.linalg.svd(p.grad, full_matrices=False)
            p.grad = u @ torch.diag(torch.linspace(1, 4, len(values))) @ v
            orthogonal[name] = u @ v
    for optimizer in make_optimizers(stage.model, stage.blocks, settings):
        optimizer.step()
    for name, p in stage.model.named_parameters():
        update = (before[name] - p.detach()) / settings.learning_rate
        if name not in orthogonal:
            assert torch.allclose(update, p.grad.sign(), atol=1e-2), name
            continue
        values = torch.linalg.svdvals(update) / (0.2 * max(p.shape) ** 0.5)
        assert (values > 0.6).all(), name  # where five Newton-Schulz steps end
        assert (values < 1.3).all(), name
        assert torch.cosine_similarity(update.flatten(), orthogonal[name].flatten(), dim=0) > 0.95, name
    assert len(orthogonal) == 3 * 4 + 1  # query-key-value, projection and the MLP's two in each block, and a skip


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.slow
def test_compiled_blocks_have_the_losses_of_plain_ones(shards, tmp_path):
    plain, compiled = (config(shards, tmp_path / name, steps=3, compile=name == "compiled") for name in ("plain", "compiled"))
    for settings in (plain, compiled):
        train(LatentStage(settings), settings, progress=False)
    assert np.abs(np.subtract(losses(tmp_path / "plain"), losses(tmp_path / "compiled"))).max() < 1e-5
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", "compiled"))
    assert a.keys() == b.keys()


def test_muon_is_refused_where_nothing_is_for_it(shards, tmp_path):
    settings = config(shards, tmp_path / "run", optimizer="muon")
    with pytest.raises(ValueError, match="latents has none; use optimizer: adamw"):
        make_optimizers(torch.nn.Linear(2, 2), (), settings)


def test_a_shard_that_vanishes_in_mid_epoch_stops_the_run(shards, tmp_path):
    settings = config(shards, tmp_path / "run", steps=30, save_every=1)
    stage = LatentStage(settings)
    window = stage.shards.order(35, 0, 0)[:14]  # the first two shards of the first epoch
    first = {stage.shards.locate(int(i))[0] for i in window}
    for number in set(range(5)) - first:
        (shards / f"{number:05d}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has vanished; restore it"):
        train(stage, settings, progress=False)
    assert [p.name for p in checkpoints(tmp_path / "run")][-1] == "00000002"  # 2 x 6 pairs were still there


def test_a_poisoned_pair_is_named(shards, tmp_path):
    path = shards / "00003.safetensors"
    tensors = load_file(path)
    from unidiffuser.data.shards import read_notes

    notes = read_notes(path)
    tensors["mean"][:] = float("nan")
    save_file(tensors, path, metadata={"notes": json.dumps(notes)})
    settings = config(shards, tmp_path / "run", save_every=1)
    stage = LatentStage(settings)
    step = next(s for s in range(8) if any(stage.shards.locate(int(i))[0] == 3 for i in stage.order(6, 0, s)))
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step {step} \(process 0, pass 0: 6 examples, 0000\d"):
        train(stage, settings, progress=False)
    assert [int(p.name) for p in checkpoints(tmp_path / "run")] == list(range(1, step + 1))[-2:]


def test_other_data_are_another_run(shards, tmp_path):
    settings = config(shards, tmp_path / "run", steps=4)
    train(LatentStage(settings), settings, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    latent_folder(other, shards=4)
    settings.options["latents"] = str(other)
    settings.steps = 8
    with pytest.raises(ValueError, match=r"another config \(data"):
        train(LatentStage(settings), settings, progress=False)


# --- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_types", [0, 2])
def test_a_grown_network_says_what_the_small_one_says_there(data_types):
    small = UViTConfig(**TINY, img_size=4, data_types=data_types)
    torch.manual_seed(0)
    net = UViT(small)
    state, sizes = grown(net.state_dict(), small, 8)
    large = UViT(sizes)
    large.load_state_dict(state)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 128), torch.randn(2, 12, 64), 300.0, 20.0
    for a, b in zip(net(*inputs), large(*inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert large.pos_embed.shape[1] == 2 + 12 + 1 + 16
    assert grown(net.state_dict(), small, 4)[1] == small


def test_a_stage_goes_on_from_another_at_twice_the_size(shards, tmp_path):
    first = config(shards, tmp_path / "small", steps=2)
    train(LatentStage(first), first, progress=False)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["encoding"]["image_size"] = 2 * SIDE
    (shards / "manifest.json").write_text(json.dumps(manifest))
    second = config(shards, tmp_path / "large")
    second.options |= {"checkpoint": str(tmp_path / "small/model.safetensors")}
    del second.options["uvit"]
    assert LatentStage(second).model.config.latent_size == (16, 16)
    second.options["uvit"] = {**TINY, "img_size": 4}
    with pytest.raises(ValueError, match="hold latents of 16 x 16"):
        LatentStage(second)


def test_torchs_default_dtype_changes_no_example_and_no_loss(shards, tmp_path):
    stage = LatentStage(config(shards, tmp_path / "out"))
    stage.mix, stage.lean, stage.logit_normal = {"independent": 1.0, "equal": 1.0}, 0.5, [0.0, 1.0]

    def step():
        batch = stage.examples(torch.arange(6), list(range(6)))
        losses = stage.loss(stage.model, batch, torch.Generator().manual_seed(0))
        return {name: (str(value.dtype), value.tolist()) for name, value in {**batch, **losses}.items()}

    expected = step()
    for table in (objective._on, objective._lean_density, objective._logit_normal_density):
        table.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert step() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": 2, 5: 1}, "unknown options 5, windows; known are latents, checkpoint, uvit"),
        ({"lean": "strong"}, "options: lean must be a number, got 'strong'"),
        ({"mix": {"equal": "half"}}, r"options: mix\.equal must be a number, got 'half'"),
        ({"mix": {"equals": 1}}, "mix has unknown regions"),
        ({"logit_normal": [0, 0]}, "logit_normal must be a mean and a std above 0"),
        ({"data_type": 5}, r"data_type must be 1 \(curated\) or 0 \(web\), got 5"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"defaults": {"steps": "many"}}, "defaults.steps must be a whole number"),
        ({"uvit": {"embed_dim": "wide"}}, "uvit.embed_dim must be a whole number"),
        ({"uvit": {"embed_dimension": 64}}, "uvit has no size embed_dimension"),
        ({"sample_prompts": "red circle"}, "options: sample_prompts must be a list"),
        ({"checkpoint": 5}, "options: checkpoint must be a text, got 5"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_mistakes_in_the_options_are_one_line_before_anything_is_built(shards, tmp_path, options, words):
    settings = config(shards, tmp_path / "out")
    settings.options |= options
    with pytest.raises(ValueError, match=words) as error:
        LatentStage(settings)
    assert "\n" not in str(error.value)


def test_numbers_that_yaml_takes_for_texts_are_numbers_in_the_options_too(shards, tmp_path):
    settings = config(shards, tmp_path / "out")
    settings.options |= {"lean": "5e-1", "mix": {"independent": "1e0"}}
    stage = LatentStage(settings)
    assert (stage.lean, stage.mix) == (0.5, {"independent": 1.0})


# --- cost of an example -------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_matrices():
    sizes = UViTConfig(**TINY, img_size=4, data_types=2)
    tokens, dim = 2 + 1 + 12 + 1 + 4, 32
    block = 2 * tokens * dim * dim * (3 + 1 + 4 + 4) + 4 * tokens * tokens * dim
    ends = 2 * dim * (2 * 12 * 64 + 2 * 128 + 2 * 4 * 16)
    expected = 3 * (3 * block + 2 * tokens * 2 * dim * dim + ends)
    assert example_cost(sizes).tokens == tokens
    assert example_cost(sizes).flops == pytest.approx(expected)


# --- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("ddp", "adamw"),
        ("fsdp", "muon"),
        pytest.param("fsdp", "adamw", marks=pytest.mark.slow),
        pytest.param("ddp", "muon", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_losses_of_one(shards, tmp_path, strategy, optimizer):
    one = config(shards, tmp_path / "one", batch_size=7, micro_batch=2, optimizer=optimizer)
    train(LatentStage(one), one, progress=False)
    two = config(shards, tmp_path / "two", batch_size=7, micro_batch=2, strategy=strategy, optimizer=optimizer)
    finish(launch(two, 2))
    assert np.abs(np.subtract(losses(tmp_path / "one"), losses(tmp_path / "two"))).max() < 1e-5
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    bound = (
        1e-4 if optimizer == "adamw" else 5e-4
    )  # Muon's updates are made in bf16, from parts that FSDP2 sums in another order
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=bound) for name in a)
    # What two processes saved, one goes on from.
    two.steps = one.steps = 12
    train(LatentStage(one), one, progress=False)
    train(LatentStage(two), two, progress=False)
    assert np.abs(np.subtract(losses(tmp_path / "one"), losses(tmp_path / "two"))).max() < 1e-5


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_torchrun(shards, tmp_path):
    """kill -9 of one of two: torchrun starts both again, they go on, and the losses are those of an unbroken run."""
    whole = config(shards, tmp_path / "whole", steps=40, save_every=5)
    train(LatentStage(whole), whole, progress=False)
    broken = config(shards, tmp_path / "broken", steps=40, save_every=5)
    process = launch(broken, 2, "--max-restarts=1")
    limit = time.monotonic() + 300
    while not checkpoints(tmp_path / "broken") and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    import psutil

    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "unidiffuser" in " ".join(p.cmdline())]
    with contextlib.suppress(ProcessLookupError):
        os.kill(max(p.pid for p in workers), signal.SIGKILL)
    finish(process)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert not list((tmp_path / "broken/checkpoints").glob(".*"))


def test_two_workers_encode_what_one_encodes(tmp_path):
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_tar(tmp_path / f"in/{number:05d}.tar", tar_samples(4 * number, 4))
    options = ["--image-size", str(SIDE), "--device", "cpu"]
    command = ["data", "encode", str(tmp_path / "in")]
    finish(torchrun(2, "-m", "unidiffuser", *command, str(tmp_path / "two"), *options))
    from typer.testing import CliRunner

    from unidiffuser.cli import app

    assert CliRunner().invoke(app, [*command, str(tmp_path / "one"), *options]).exit_code == 0
    same_tree(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two/manifest.json").read_text())["samples"] == 12


# --- prompts and pictures --------------------------------------------------------------------------------------------


def same_tree(a: Path, b: Path) -> None:
    names = {p.relative_to(a) for p in a.rglob("*") if p.is_file()}
    assert names == {p.relative_to(b) for p in b.rglob("*") if p.is_file()}
    for name in names:
        if name.suffix == ".safetensors" and not EXACT:
            one, other = load_file(a / name), load_file(b / name)
            assert one.keys() == other.keys()
            for key in one:
                assert_same(one[key], other[key])
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def run(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from unidiffuser.cli import app

    return CliRunner().invoke(app, [*arguments, "-q", "--device", "cpu"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives each process: in float32 another number of threads adds up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_prompts_on_two_processes_give_the_files_of_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n\nlion\npizza\nrocket\nfox\n")
    options = ["--steps", "1", "--batch-size", "2"]
    prompts = str(tmp_path / "prompts.txt")
    result = run("generate", prompts, "--out", str(tmp_path / "one"), *options)
    assert result.exit_code == 0, result.output
    finish(torchrun(2, "-m", "unidiffuser", "generate", prompts, "-o", str(tmp_path / "two"), *options, "--device", "cpu"))
    same_tree(tmp_path / "one", tmp_path / "two")
    rows = [json.loads(line) for line in (tmp_path / "one/manifest.jsonl").read_text().splitlines()]
    assert [(r["number"], r["source"], r["seed"]) for r in rows] == [
        (k, word, k) for k, word in enumerate(["red apple", "lion", "pizza", "rocket", "fox"])
    ]
    # Broken off: what has no record is made again, the rest is not touched.
    (tmp_path / "two/.parts/000001.jsonl").unlink()
    (tmp_path / "two/000002.png").unlink()
    kept = (tmp_path / "two/000000.png").stat().st_mtime_ns
    assert run("generate", prompts, "--out", str(tmp_path / "two"), *options).exit_code == 0
    same_tree(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two/000000.png").stat().st_mtime_ns == kept
    result = run("generate", prompts, "--out", str(tmp_path / "two"), "--steps", "2", "--batch-size", "2")
    assert result.exit_code == 2
    assert "other settings (steps 1 there, 2 here)" in result.output


def test_captions_of_a_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for k in range(3):
        picture(k, 128)[0].save(folder / f"{k}.png")
    (folder / "deep/broken.jpg").write_bytes(b"no picture")
    options = ["--steps", "1", "--batch-size", "2"]
    assert run("caption", str(folder), "--out", str(tmp_path / "out"), *options).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["0.png", "1.png", "2.png", "deep/broken.jpg"]
    assert "not a picture" in rows[3]["error"]
    assert (tmp_path / "out/1.png.txt").read_text().strip()
    result = run("caption", str(tmp_path / "out"), "--out", str(tmp_path / "out2"))
    assert result.exit_code == 2
    assert "holds no pictures" in result.output


def test_lists_that_are_none(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    assert "holds no prompts" in run("generate", str(tmp_path / "p.txt")).output
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in run("generate", str(tmp_path / "p.txt")).output
    assert "no file of prompts" in run("generate", str(tmp_path / "q.txt")).output
