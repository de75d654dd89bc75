"""Distillation: routes, trajectories, the target of a step, and students that come closer to their teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import random_latents
from test_scale import finish, launch, losses
from tiny import HEAD, write_tiny_checkpoint
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from unidiffuser.cli import app
from unidiffuser.data.fingerprint import check_encoders, fingerprint
from unidiffuser.data.shards import MANIFEST, LatentShards
from unidiffuser.distributed import World
from unidiffuser.path import CLEAN, NoisePath
from unidiffuser.runtime.lora import layers_of, read_lora
from unidiffuser.samplers import sample
from unidiffuser.schedule import add_noise, alpha_sigma
from unidiffuser.streams import Streams, item_generators
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.distill import HUBER, DistillStage, pseudo_huber, velocity_errors
from unidiffuser.training.distill_run import Conditions, distill, distill_config
from unidiffuser.training.fine_tune import fine_tune_config, fine_tune_stage
from unidiffuser.training.latent_stage import LatentStage
from unidiffuser.training.loop import train
from unidiffuser.training.network import trainable_network
from unidiffuser.training.trajectories import INDEX, Route, Trajectories, draw_trajectories

ALONE = World(0, 1, torch.device("cpu"))
ROUTES = (
    Route("text_to_image", steps=2, every=3, count=6),
    Route("image_to_text", steps=1, every=3, count=4),
    Route("joint", steps=3, every=2, count=5, speeds=(1.0, 2.0)),
    Route("image", steps=2, every=2, count=3),
)
WAITING = Route("joint", steps=4, every=2, count=3, speeds=(0.0, 1.0))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    write_tiny_checkpoint(path, uvit=HEAD)
    return path


@pytest.fixture(scope="module")
def latents(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pairs of random latents, with two captions each."""
    return random_latents(tmp_path_factory.mktemp("latents"), load_checkpoint(teacher).config.uvit.item_shapes, 5)


@pytest.fixture(scope="module")
def drawn(teacher: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn")
    draw_trajectories(
        lambda: network(teacher), ROUTES, Conditions(LatentShards(latents)), out, {"model": "tiny"}, ALONE, seed=3
    )
    return out


def network(path: Path) -> unidiffuser.uvit.UViT:
    checkpoint = load_checkpoint(path)
    return trainable_network(checkpoint.config.uvit, checkpoint.state_dict("uvit", dtype=torch.float32)).eval()


# --- routes and trajectories -----------------------------------------------------------------------------------------


def test_a_student_takes_every_nth_point_of_the_path() -> None:
    route = Route("joint", steps=4, every=5, speeds=(1.0, 2.0))
    assert route.path.steps == 20
    assert route.student_path.t_img == (1000.0, 750.0, 500.0, 250.0, 0.0)
    assert route.student_path.t_text == (1000.0, 500.0, 0.0, 0.0, 0.0)
    assert route.given() == []
    assert Route("text_to_image").given() == ["text"]
    assert Route("image_to_text").given() == ["img", "clip_img"]
    assert Route("image").held("text") == 1000


@pytest.mark.parametrize(
    ("values", "text"),
    [({"task": "gibbs"}, "task is 'gibbs'; choose one of text_to_image"), ({"task": "joint", "steps": 0}, "steps must be at")],
)
def test_routes_that_make_no_sense_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Route(**values)  # type: ignore[arg-type]


def test_trajectories_are_those_of_the_sampler(teacher: Path, latents: Path, drawn: Path) -> None:
    found = Trajectories(drawn)
    assert found.size == 18
    shards = LatentShards(latents)
    for route, number, first in ((ROUTES[0], 4, 0), (ROUTES[1], 2, 6), (ROUTES[2], 3, 10)):
        condition = Conditions(shards)(route.task, number) if route.given() else Streams()
        alone = sample(
            network(teacher), route.path, condition, guidance=route.guidance, generator=item_generators(3 + number, 1)
        )
        assert found.route_of(first + number).task == route.task
        last = found.read(first + number, route.steps - 1, route.steps)
        for name, value in alone.items():
            torch.testing.assert_close(last[name][1], value[0], rtol=2e-3, atol=2e-3)  # half precision
    assert "text" not in found.read(15, 0, 1)  # marginalised


def test_each_caption_of_a_pair_gets_its_turn(latents: Path) -> None:
    shards = LatentShards(latents)
    conditions, row = Conditions(shards), shards.read(torch.tensor([2]))[0]
    for number, caption in ((2, 0), (7, 1), (12, 0)):
        assert torch.equal(conditions("text_to_image", number).need("text")[0], row["text"][caption])
    assert not torch.equal(conditions("image_to_text", 2).need("img"), conditions("image_to_text", 7).need("img"))


def test_drawing_goes_on_and_refuses_other_settings(teacher: Path, latents: Path, tmp_path: Path) -> None:
    conditions, counts, built = Conditions(LatentShards(latents)), list[int](), list[int]()

    def build() -> unidiffuser.uvit.UViT:
        built.append(len(counts))
        return network(teacher)

    def draw(*routes: Route, seed: int = 0) -> None:
        draw_trajectories(build, routes, conditions, tmp_path, {}, ALONE, seed=seed, watch=counts.append)

    draw(*ROUTES[:2])
    before = (tmp_path / "image_to_text-00000.safetensors").read_bytes()
    (tmp_path / "image_to_text-00000.safetensors").unlink()
    draw(*ROUTES[:2])
    draw(*ROUTES[:2])
    assert counts == [6, 4, 4]
    assert built == [0, 2]  # once for both files, once for the missing one, and not where nothing is missing
    assert (tmp_path / "image_to_text-00000.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"other settings .*seed 0 there, 1 here"):
        draw(*ROUTES[:2], seed=1)
    with pytest.raises(ValueError, match="one route"):
        draw(ROUTES[0], replace(ROUTES[0], steps=3))
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="draw the trajectories first"):
        Trajectories(tmp_path)


# --- the target of a step --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_large_errors_count_by_their_size(errors: list[float]) -> None:
    squared = torch.tensor(errors, dtype=torch.float64)
    loss = pseudo_huber(squared)
    torch.testing.assert_close((loss + HUBER).square() - HUBER**2, squared)
    assert (loss <= squared.sqrt()).all()


def test_errors_are_those_of_the_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, generator=generator)
    label = torch.tensor([1000.0, 600.0, 5.0, 0.0])
    x = torch.stack([add_noise(a, b, t) for a, b, t in zip(x0, eps, label, strict=True)])
    error, count = velocity_errors(eps, x, x0, label)
    assert error[:3].max() < 1e-6
    assert count.tolist() == [15, 15, 15, 0]
    wrong, _ = velocity_errors(eps + 0.1, x, x0, label)
    alpha, _ = alpha_sigma(label[:3])
    torch.testing.assert_close(wrong[:3], 15 * (0.1 / alpha).square(), rtol=1e-3, atol=0)
    assert wrong[3] == 0


# --- students --------------------------------------------------------------------------------------------------------


def distance(net: unidiffuser.uvit.UViT, found: Trajectories, task: str) -> float:
    """Mean squared distance of what one evaluation predicts from where the teacher's trajectories of the same starts end."""
    route = found.routes[task]
    start, end = found.ends(route, route.count)
    path = NoisePath(route.path.t_img[:: route.path.steps], route.path.t_text[:: route.path.steps])
    out = sample(net, path, start, method="lcm", generator=item_generators(0, route.count))
    moving = [name for name, _ in end.items() if name not in route.given()]
    return sum((out.need(name) - end.need(name)).square().mean().item() for name in moving)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_student_comes_closer_to_its_teacher(teacher: Path, latents: Path, tmp_path: Path, rank: int | None) -> None:
    config = distill_config(tmp_path / "run", steps=60, batch_size=18, learning_rate=5e-3, ema_decay=0.9)
    made = distill(config, teacher, latents, ROUTES[:3], rank=rank, progress=False)
    found, before = Trajectories(tmp_path / "run/trajectories"), network(teacher)
    model = unidiffuser.load(teacher if rank else made)
    if rank:
        layers = {"uvit": layers_of(model.checkpoint.state_dict("uvit"))}
        lora = read_lora(made, layers)
        assert lora.about["method"] == "lcm"
        assert lora.about["distilled"]["text_to_image"]["steps"] == 2
        model.load_lora(made)
    else:
        assert model.config.defaults["steps"] == 3
        assert model.config.defaults["guidance"] == 1
        assert model.resolve({}, "text_to_image")["steps"] == 2
        assert model.resolve({}, "joint")["method"] == "lcm"
    for task in found.routes:
        assert distance(model.net, found, task) < 0.8 * distance(before, found, task), task
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert list((tmp_path / "run/samples").glob("*.png"))


def test_streams_that_do_not_move_count_nothing(teacher: Path, drawn: Path, tmp_path: Path) -> None:
    config = distill_config(tmp_path, options={"checkpoint": str(teacher), "trajectories": str(drawn)})
    stage = DistillStage(config)
    batch = stage.examples(torch.tensor([0, 6, 10, 15]), [0, 1, 2, 3])
    assert batch["moves_img"].gt(0).tolist() == [True, False, True, True]
    assert batch["moves_text"].tolist()[0] == batch["moves_text"].tolist()[3] == CLEAN
    assert batch["t_text"][3] == 1000
    torch.manual_seed(1)
    again = stage.examples(torch.tensor([0, 6, 10, 15]), [0, 1, 2, 3])
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_the_target_of_a_point_is_the_end_of_its_trajectory(teacher: Path, drawn: Path, tmp_path: Path) -> None:
    stage = DistillStage(distill_config(tmp_path, options={"checkpoint": str(teacher), "trajectories": str(drawn)}))
    path = ROUTES[2].student_path
    seen = set()
    for seed in range(20):
        batch = stage.examples(torch.tensor([12]), [seed])
        point = min(range(3), key=lambda i: abs(path.t_img[i] - float(batch["t_img"])))
        seen.add(point)
        states = stage.trajectories.read(12, point, 3)
        for name, (here, end) in states.items():
            assert torch.equal(batch[name][0], here)
            assert torch.equal(batch[f"x0_{name}"][0], end)
        assert float(batch["moves_img"]) == pytest.approx(path.t_img[point])
        assert float(batch["moves_text"]) == pytest.approx(path.t_text[point])  # 0 where the text is finished
    assert seen == {0, 1, 2}


def test_a_stream_that_waits_is_learnt_when_it_moves(teacher: Path, latents: Path, tmp_path: Path) -> None:
    draw_trajectories(lambda: network(teacher), [WAITING], Conditions(LatentShards(latents)), tmp_path, {}, ALONE)
    stage = DistillStage(distill_config(tmp_path, options={"checkpoint": str(teacher), "trajectories": str(tmp_path)}))
    for seed in range(12):
        batch = stage.examples(torch.tensor([1]), [seed])
        assert float(batch["moves_img"]) == (0 if batch["t_text"] > 0 else batch["t_img"])
        assert float(batch["moves_text"]) == batch["t_text"]
    assert stage.trajectories.read(1, 0, 2)["img"][0].equal(stage.trajectories.read(1, 0, 2)["img"][1])


@pytest.mark.parametrize(
    ("fewest", "text"),
    [({"joint": 2}, "must divide its 3 steps, got 2"), ({"joint": "1"}, "must divide"), ({"joint": True}, "must divide"),
     ({"text": 1}, "given for text; ")],
)  # fmt: skip
def test_steps_of_the_preset_that_make_no_sense_are_refused(
    teacher: Path, drawn: Path, tmp_path: Path, fewest: dict[str, object], text: str
) -> None:
    options = {"checkpoint": str(teacher), "trajectories": str(drawn), "fewest": fewest}
    with pytest.raises(ValueError, match=text):
        DistillStage(distill_config(tmp_path, options=options))


def test_two_processes_and_a_resumed_run_have_the_losses_of_one(teacher: Path, drawn: Path, tmp_path: Path) -> None:
    def config(name: str, steps: int = 8) -> TrainConfig:
        options = {"checkpoint": str(teacher), "trajectories": str(drawn), "rank": 2}
        run = {"save_every": 4, "sample_every": 100, "precision": "no", "options": options}
        return distill_config(tmp_path / name, steps=steps, batch_size=6, **run)

    one, two = config("one"), config("two")
    train(DistillStage(one), one, progress=False)
    finish(launch(two, 2))
    assert np.abs(np.subtract(losses(tmp_path / "one"), losses(tmp_path / "two"))).max() < 1e-5
    for name, steps in (("whole", 12), ("broken", 8), ("broken", 12)):
        again = config(name, steps)
        again.decay = 0.0
        train(DistillStage(again), again, progress=False)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_the_command(teacher: Path, latents: Path, tmp_path: Path) -> None:
    arguments = ["distill", str(latents), "--model", str(teacher), "--out", str(tmp_path / "out"), "--count", "3"]
    short = ["--steps", "2", "--batch-size", "2", "--teacher-steps", "4", "--rank", "2"]
    done = CliRunner().invoke(app, [*arguments, *short, "--task", "text-to-image=2", "--task", "joint=2"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/lora.safetensors").is_file()
    assert sorted(Trajectories(tmp_path / "out/trajectories").routes) == ["joint", "text_to_image"]
    for entry, text in (
        ("joint", "TASK=STEPS"),
        ("joint=4/", "TASK=STEPS"),
        ("joint=4/3", "must divide"),
        ("gibbs=2", "choose one of text_to_image"),
    ):
        wrong = CliRunner().invoke(app, [*arguments, "--task", entry])
        assert wrong.exit_code == 2
        assert text in wrong.output


def test_shards_of_other_encoders_are_refused(teacher: Path, latents: Path, tmp_path: Path) -> None:
    """By each command that reads shards; the same encoders saved in float32, or shards that do not say, pass."""
    opened = load_checkpoint(teacher)
    parts = {part: opened.state_dict(part) for part in opened.parts()}
    for name, dtype in (("half", torch.float16), ("full", torch.float32)):
        source = opened if name == "half" else load_checkpoint(tmp_path / "half.safetensors")
        parts = {part: source.state_dict(part) for part in opened.parts()}
        save_checkpoint(tmp_path / f"{name}.safetensors", opened.config, parts, opened.tokenizer_specs(), dtype)
    bent = {**parts, "vae": {name: tensor + 1 for name, tensor in parts["vae"].items()}}
    save_checkpoint(tmp_path / "bent.safetensors", opened.config, bent, opened.tokenizer_specs())
    save_checkpoint(tmp_path / "net.safetensors", opened.config, {"uvit": parts["uvit"]})
    manifest = json.loads((latents / MANIFEST).read_text())
    for file in latents.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest["encoding"]["encoders"] = fingerprint(load_checkpoint(tmp_path / "half.safetensors"))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    shards = LatentShards(tmp_path)
    for name in ("half", "full", "net"):
        check_encoders(shards, load_checkpoint(tmp_path / f"{name}.safetensors"))
    wrong = str(tmp_path / "bent.safetensors")
    check_encoders(LatentShards(latents), load_checkpoint(wrong))
    options = {"latents": str(tmp_path), "checkpoint": wrong}
    for call in (
        lambda: distill(distill_config(tmp_path / "a"), wrong, tmp_path, ROUTES[:1], progress=False),
        lambda: fine_tune_stage(fine_tune_config(tmp_path / "b", options=options)),
        lambda: LatentStage(TrainConfig("latents", str(tmp_path / "c"), options=options)),
    ):
        with pytest.raises(ValueError, match=r"were made by other encoders .* than those of .*bent\.safetensors"):
            call()


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": "4"}, {"dtype": "int8"}, {"checkpoint": None}, {"trajectories": 5}])
def test_options_of_another_type_are_refused(teacher: Path, tmp_path: Path, options: dict[str, object]) -> None:
    (name,) = options
    given = {"checkpoint": str(teacher), "trajectories": str(tmp_path), **options}
    with pytest.raises(ValueError, match=f"{name} must be"):
        DistillStage(distill_config(tmp_path, options=given))


def test_unknown_options_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown options guidance; known are checkpoint"):
        DistillStage(distill_config(tmp_path, options={"checkpoint": str(teacher), "guidance": 3}))
