"""The objective of training, and the loop's exact resume."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unidiffuser.evaluation.metrics import psnr
from unidiffuser.schedule import add_noise, alphas_cumprod, half_logsnr
from unidiffuser.streams import Streams
from unidiffuser.training.augment import augmented
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.loop import train
from unidiffuser.training.objective import diffusion_loss, draw_labels
from unidiffuser.training.saving import checkpoints
from unidiffuser.training.stage import TrainingStage, seeded_init, step_indices
from unidiffuser.training.stages import make_stage

# --- objective -----------------------------------------------------------------------------------------------------


def test_paper_objective_draws_independent_uniform_labels():
    labels = draw_labels(20000, {"independent": 1.0}, torch.Generator().manual_seed(0))
    for t in labels.values():
        assert t.min() >= 1
        assert t.max() <= 1000
        assert abs(t.double().mean() - 500.5) < 6  # standard error 2.0
    correlation = np.corrcoef(labels["img"].numpy(), labels["text"].numpy())[0, 1]
    assert abs(correlation) < 0.03


def test_mix_shares_are_kept():
    labels = draw_labels(10000, {"independent": 1, "clean_text": 1, "equal": 2}, torch.Generator().manual_seed(0))
    assert abs((labels["text"] == 0).double().mean() - 0.25) < 0.02
    assert (labels["img"] == 0).sum() == 0
    alone = draw_labels(10000, {"no_text": 1, "independent": 3}, torch.Generator().manual_seed(0))
    assert abs((alone["text"] == 1000).double().mean() - 0.25) < 0.02
    assert len(alone["img"][alone["text"] == 1000].unique()) > 500
    assert abs((labels["img"] == labels["text"]).double().mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match="unknown regions"):
        draw_labels(4, {"clean": 1}, torch.Generator())
    with pytest.raises(ValueError, match="positive"):
        draw_labels(4, {"equal": 0}, torch.Generator())


def test_lean_sees_labels_in_proportion_to_a_power_of_noise_over_signal():
    count, lean = 200_000, 0.5
    labels = draw_labels(count, {"independent": 1.0}, torch.Generator().manual_seed(0), lean)
    alpha = alphas_cumprod().sqrt()
    expected = ((1 - alpha**2).sqrt() / alpha) ** lean
    expected = (expected / expected.sum()).view(10, 100).sum(1)  # ten ranges of 100 labels
    for drawn in labels.values():
        assert drawn.min() >= 1
        assert drawn.max() == 1000
        seen = torch.bincount((drawn - 1) // 100, minlength=10) / count
        assert torch.allclose(seen.double(), expected, atol=5 * 0.5 / count**0.5)  # five standard errors
    edges = draw_labels(1000, {"clean_text": 1, "equal": 1}, torch.Generator().manual_seed(0), lean)
    assert ((edges["text"] == 0) | (edges["text"] == edges["img"])).all()


def test_logit_normal_labels_of_images_are_normal_in_the_logarithm_of_noise_over_signal():
    drawing = torch.Generator().manual_seed(0)
    labels = draw_labels(100_000, {"independent": 1.0}, drawing, logit_normal=[0.5, 0.4])  # no end of the schedule is near
    log_noise = -half_logsnr(labels["img"].double())
    assert abs(log_noise.mean() - 0.5) < 0.01  # standard error 0.0013
    assert abs(log_noise.std() - 0.4) < 0.01
    below = (log_noise < 0.5 + 0.4).double().mean()
    assert abs(below - 0.8413) < 0.01  # of a normal distribution, below one standard deviation
    assert abs(labels["text"].double().mean() - 500.5) < 5  # texts have a lean of their own, here none


def test_a_lean_below_zero_is_refused():
    with pytest.raises(ValueError, match="lean"):
        draw_labels(4, {"equal": 1}, torch.Generator(), lean=-1.0)


@pytest.mark.parametrize("mean_and_std", [[0.8, 0.0], [0.8]])
def test_a_logit_normal_without_width_is_refused(mean_and_std):
    with pytest.raises(ValueError, match="logit_normal must be a mean and a std above 0"):
        draw_labels(4, {"equal": 1}, torch.Generator(), logit_normal=mean_and_std)


def test_loss_is_the_plain_mean_over_noised_elements():
    """A network that predicts zero has as its loss the mean square of the noise, which the generator repeats."""
    clean = Streams(torch.randn(6, 4, 4, 4), torch.randn(6, 1, 8), torch.randn(6, 3, 5))

    def zero(img, clip_img, text, t_img, t_text, data_type):
        return torch.zeros_like(img), torch.zeros_like(clip_img), torch.zeros_like(text)

    generator = torch.Generator().manual_seed(3)
    labels = draw_labels(6, {"clean_text": 1}, generator)
    noise = clean.map(lambda x: torch.randn(x.shape, generator=generator))
    expected = torch.cat([noise.img.flatten(), noise.clip_img.flatten()]).square().mean()
    drawing = torch.Generator().manual_seed(3)
    got = diffusion_loss(zero, clean, drawing, labels=draw_labels(6, {"clean_text": 1}, drawing))
    assert torch.isclose(got["loss"], expected)
    assert got["text"] == 0  # a clean stream has no noise to predict
    assert (labels["text"] == 0).all()


def test_a_weight_counts_the_elements_of_a_stream_so_many_times():
    clean = Streams(torch.randn(6, 4, 4, 4), torch.randn(6, 1, 8), torch.randn(6, 3, 5))

    def zero(img, clip_img, text, t_img, t_text, data_type):
        return torch.zeros_like(img), torch.zeros_like(clip_img), torch.zeros_like(text)

    plain, none, weighted = (
        diffusion_loss(zero, clean, torch.Generator().manual_seed(0), weights=w)
        for w in (None, {}, {"text": 5.0, "clip_img": 2})
    )
    assert plain == none
    assert {name: plain[name] for name in ("img", "clip_img", "text")} == {
        name: weighted[name] for name in plain if name != "loss"
    }
    sizes = {"img": 64, "clip_img": 8, "text": 15}
    added = (4 * sizes["text"] * plain["text"] + sizes["clip_img"] * plain["clip_img"]) / sum(sizes.values())
    assert torch.isclose(weighted["loss"], plain["loss"] + added)


def test_a_network_that_knows_the_data_has_no_loss():
    clean = Streams(torch.randn(5, 4, 4, 4), torch.randn(5, 1, 8), torch.randn(5, 3, 5))

    def oracle(img, clip_img, text, t_img, t_text, data_type):
        def eps(noised, x0, t):
            alpha_x0 = add_noise(x0, torch.zeros_like(x0), t.float())
            sigma = add_noise(torch.zeros_like(x0), torch.ones_like(x0), t.float())
            return (noised - alpha_x0) / sigma

        return eps(img, clean.img, t_img), eps(clip_img, clean.clip_img, t_img), eps(text, clean.text, t_text)

    assert diffusion_loss(oracle, clean, torch.Generator().manual_seed(0))["loss"] < 1e-6


# --- data ----------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 50), batch=st.integers(1, 64), seed=st.integers(0, 9), epochs=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_picture_once(size, batch, seed, epochs):
    steps = -(-size * epochs // batch)
    seen = torch.cat([step_indices(size, batch, seed, k) for k in range(steps)])[: size * epochs]
    assert torch.equal(seen.bincount(minlength=size), torch.full((size,), epochs))


def test_augmentation_keeps_white_and_repeats():
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = augmented(pixels, torch.Generator().manual_seed(1), place=0.0, colour=0.0)
    assert torch.allclose(same, pixels, atol=1e-5)
    first, second = (augmented(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert ((first - pixels).flatten(1).abs().mean(1) > 0.05).all()  # each picture is changed
    assert torch.allclose(augmented(torch.ones(3, 3, 8, 8), torch.Generator()), torch.ones(3, 3, 8, 8), atol=1e-5)


# --- the loop ------------------------------------------------------------------------------------------------------


class Line(TrainingStage):
    """A tiny regression, with noise from the step's generator so that a resume must restore that too."""

    def __init__(self, out: Path, slow: float = 0.0, poison: int = -1):
        with seeded_init(0):
            self.model = nn.Linear(4, 1)
        self.size, self.out, self.slow, self.poison, self.calls = 32, out, slow, poison, 0
        self.x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def examples(self, indices, seeds):
        return {"x": self.x[indices]}

    def loss(self, model, batch, generator):
        time.sleep(self.slow)
        self.calls += 1
        noise = torch.randn(len(batch["x"]), 1, generator=generator)
        loss = (model(batch["x"]) - batch["x"].sum(1, keepdim=True) - 0.1 * noise).square().mean()
        return {"loss": loss * float("nan") if self.calls == self.poison else loss}

    def export(self, model):
        torch.save(model.state_dict(), self.out / "line.pt")


def line_config(out: Path) -> TrainConfig:
    return TrainConfig("line", str(out), steps=40, batch_size=8, save_every=7, sample_every=100, precision="no")


def losses_of(out: Path, term: str = "loss") -> list[float]:
    return [json.loads(line)[term] for line in (out / "losses.jsonl").read_text().splitlines()]


def test_resume_after_sigkill_gives_the_same_losses(tmp_path):
    whole = tmp_path / "whole"
    train(Line(whole), line_config(whole), progress=False)
    killed = tmp_path / "killed"
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "from pathlib import Path\nimport test_training as t\n"
        f"out = Path({str(killed)!r})\n"
        "t.train(t.Line(out, slow=0.02), t.line_config(out), progress=False)\n"
    )
    chance = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        limit = time.monotonic() + 120
        before = checkpoints(killed)
        while time.monotonic() < limit and process.poll() is None:  # wait for a checkpoint of this process, then strike
            if checkpoints(killed) != before:
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert int(checkpoints(killed)[-1].name) % 7 == 0
    train(Line(killed), line_config(killed), progress=False)
    assert losses_of(killed) == losses_of(whole)
    for a, b in zip(torch.load(whole / "line.pt").values(), torch.load(killed / "line.pt").values(), strict=True):
        assert torch.equal(a, b)


def test_nan_loss_names_the_step_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 9 \(process 0, pass 0: 8 examples"):
        train(Line(tmp_path, poison=10), line_config(tmp_path), progress=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000007"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file is written")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)

    flush = os.fsync

    def full(fd):
        if ".partial" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        flush(fd)

    monkeypatch.setattr(os, "fsync", full)
    config.steps = 14
    with pytest.raises(OSError, match=r"No space left.*00000007"):
        train(Line(tmp_path), config, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000007"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    config = line_config(tmp_path)
    train(Line(tmp_path), config, progress=False)
    config.batch_size = 4
    with pytest.raises(ValueError, match="batch_size 8 there, 4 here"):
        train(Line(tmp_path), config, progress=False)
    config.batch_size = 8
    other = Line(tmp_path)
    other.model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"2 weights, as bias: \[1\] there, \[2\] here"):
        train(other, config, progress=False)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Steep(Line):
        def loss(self, model, batch, generator):
            loss = super().loss(model, batch, generator)["loss"]
            if self.calls == 10:
                loss.register_hook(lambda g: g * float("inf"))
            return {"loss": loss}

    with pytest.raises(FloatingPointError, match=r"gradient is (nan|inf) at step 9"):
        train(Steep(tmp_path), line_config(tmp_path), progress=False)


def test_accumulated_passes_are_one_batch(tmp_path):
    """The same steps in passes of 3, 3 and 2 examples, with the random numbers made for each example."""

    class Each(Line):
        def examples(self, indices, seeds):
            noise = [torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return super().examples(indices, seeds) | {"noise": torch.stack(noise)}

        def loss(self, model, batch, generator):
            return {"loss": (model(batch["x"]) - batch["x"].sum(1, keepdim=True) - 0.1 * batch["noise"]).square().mean()}

    one, many = line_config(tmp_path / "one"), line_config(tmp_path / "many")
    many.micro_batch = 3
    train(Each(tmp_path / "one"), one, progress=False)
    train(Each(tmp_path / "many"), many, progress=False)
    assert np.allclose(losses_of(tmp_path / "one"), losses_of(tmp_path / "many"), rtol=1e-5)


METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", "S'touch ran'\n"),
        ("builtins", "exec", 'S\'open("ran", "w")\'\n'),
        ("builtins", "getattr", "S'ran'\nS'upper'\n"),
        (METADATA, "os", None),
        (METADATA, "os.system", "S'touch ran'\n"),
        (METADATA, "torch.save", "S'x'\nS'ran'\n"),
        (METADATA, "dataclass", None),
        (FILES, "os", None),
        (FILES, "os.system", "S'touch ran'\n"),
        (FILES, "pickle", None),
        (FILES, "pickle.loads", "C\x05cos\n."),
        (FILES, "io.open", "S'ran'\nS'w'\n"),
        (FILES, "Path", "S'ran'\n"),
        (FILES, "Path.touch", "S'ran'\n"),
        (FILES, "FileSystem", ""),
        (FILES, "FileSystemWriter", "S'ran'\n"),
        ("torch", "save", "S'x'\nS'ran'\n"),
        ("torch", "load", "S'ran'\n"),
        ("torch", "from_file", "S'ran'\nI01\nI8\n"),
        ("torch", "os", None),
        ("torch", "compile", "S'x'\n"),
        ("torch", "float32.__reduce__", ""),
        ("torch", "serialization", None),
        ("torch.serialization", "load", "S'ran'\n"),
        ("torch.serialization", "os", None),
        ("collections", "abc", None),
        ("pathlib", "os", None),
        ("pathlib", "PosixPath.touch", "S'ran'\n"),
    ],
)
def test_the_index_of_a_checkpoint_cannot_call_anything(tmp_path, monkeypatch, module, name, arguments):
    """Only what an index consists of is found: no call, and no module from which one could be fetched."""
    from unidiffuser.training.saving import load_average

    monkeypatch.chdir(tmp_path)
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)
    index = checkpoints(tmp_path)[-1] / ".metadata"
    call = "" if arguments is None else f"({arguments}tR"
    text = f"\x80\x04c{module}\n{name}\n{call}."
    index.write_bytes(text.encode("latin-1"))
    refused = rf"00000007 cannot be read.*index names {re.escape(module)}\.{re.escape(name)}, which no index needs.*remove it"
    with pytest.raises(ValueError, match=refused):
        load_average(tmp_path, nn.Linear(4, 1))
    config.steps = 14
    with pytest.raises(ValueError, match=refused):
        train(Line(tmp_path), config, progress=False)
    assert not Path("ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_the_index_of_a_run_of_any_dtype_is_read(tmp_path, dtype):
    from unidiffuser.training.saving import load_average

    line = Line(tmp_path)
    line.model.to(dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32)
    line.x = line.x.to(line.model.weight.dtype)
    line.loss = lambda model, batch, generator: {"loss": model(batch["x"]).float().square().mean()}
    line.model.register_buffer("kept", torch.ones(3).to(dtype))
    config = line_config(tmp_path)
    config.steps = 7
    train(line, config, progress=False)
    config.steps = 14
    train(line, config, progress=False)
    assert [p.name for p in checkpoints(tmp_path)][-1] == "00000014"
    assert load_average(tmp_path, nn.Linear(4, 1).to(line.model.weight.dtype)).weight.isfinite().all()


class Call:
    """Unpickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [Call(os.system, "touch ran"), Call(exec, "open('ran', 'w')"), Call(torch.save, [1], "ran")])
def test_the_values_of_a_checkpoint_cannot_call_anything(tmp_path, monkeypatch, call):
    """torch's load planner reads what is no tensor, such as a learning rate, with ``weights_only=False``."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    from unidiffuser.training import saving

    class Hostile(DefaultSavePlanner):
        def resolve_data(self, write_item):
            data = super().resolve_data(write_item)
            if write_item.index.fqn != "optimizer.param_groups.0.lr":
                return data
            torch.save(call, file := io.BytesIO())
            return file

    monkeypatch.chdir(tmp_path)
    config, save = line_config(tmp_path), saving.dcp_save
    config.steps = 7
    with monkeypatch.context() as patched:
        patched.setattr(saving, "dcp_save", lambda *args, **options: save(*args, planner=Hostile(), **options))
        train(Line(tmp_path), config, progress=False)
    config.steps = 14
    with pytest.raises(ValueError, match=r"00000007 cannot be read.*param_groups\.0\.lr asks for \S+ and could run.*remove"):
        train(Line(tmp_path), config, progress=False)
    assert not Path("ran").exists()


def test_a_damaged_value_of_a_checkpoint_is_named(tmp_path):
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)
    for file in checkpoints(tmp_path)[-1].glob("*.distcp"):
        data = file.read_bytes()
        file.write_bytes(data.replace(b"data.pkl", b"data.pkx"))
    with pytest.raises(ValueError, match="00000007 cannot be read"):
        train(Line(tmp_path), config, progress=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, r"is not valid JSON \(nested too deeply\)"),
        ("[]", "holds no JSON object"),
        ('{"step": "7", "shapes": {}}', "has no step and shapes"),
        ('{"step": 7, "shapes": []}', "has no step and shapes"),
        ('{"step": -1, "shapes": {}}', "has no step and shapes"),
    ],
)
def test_a_damaged_record_of_a_checkpoint_is_named(tmp_path, text, words):
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)
    (checkpoints(tmp_path)[-1] / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"00000007/run\.json {words}.*go on from the one before it"):
        train(Line(tmp_path), config, progress=False)


def test_a_value_of_another_type_is_refused(tmp_path, monkeypatch):
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    from unidiffuser.training import saving

    class Bent(DefaultSavePlanner):
        def resolve_data(self, write_item):
            data = super().resolve_data(write_item)
            if write_item.index.fqn != "optimizer.param_groups.0.lr":
                return data
            torch.save("fast", file := io.BytesIO())
            return file

    config, save = line_config(tmp_path), saving.dcp_save
    config.steps = 7
    with monkeypatch.context() as patched:
        patched.setattr(saving, "dcp_save", lambda *args, **options: save(*args, planner=Bent(), **options))
        train(Line(tmp_path), config, progress=False)
    config.steps = 14
    with pytest.raises(ValueError, match=r"param_groups\.0\.lr is 'fast', but must be like"):
        train(Line(tmp_path), config, progress=False)


def test_training_leaves_the_global_generator_alone(tmp_path):
    state = torch.random.get_rng_state()
    train(Line(tmp_path), line_config(tmp_path), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_config_files(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(FileNotFoundError):
        TrainConfig.from_file(path)
    path.write_text("stage: uvit\nout: x\nlearning_rte: 1\n")
    with pytest.raises(ValueError, match="learning_rte"):
        TrainConfig.from_file(path)
    path.write_text("stage: nothing\nout: x\nsteps: 5\n")
    with pytest.raises(ValueError, match="unknown stage"):
        make_stage(TrainConfig.from_file(path))
    assert TrainConfig.from_file(path, steps=3).steps == 3
    for shipped in (Path(__file__).parents[1] / "unidiffuser/training/configs").rglob("*.yaml"):
        TrainConfig.from_file(shipped)


def test_learning_rate_rises_and_falls():
    c = TrainConfig("x", "y", steps=100, warmup_steps=10, decay=0.2, learning_rate=1.0)
    assert c.rate(0) == pytest.approx(0.1)
    assert c.rate(50) == 1.0
    assert c.rate(90) == pytest.approx(0.5)


def test_psnr_of_a_known_error():
    pixels = torch.zeros(1, 3, 4, 4)
    assert psnr(pixels + 0.2, pixels).item() == pytest.approx(20.0)  # 0.1 of the range: -10 log10(0.01)
