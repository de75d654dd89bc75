"""The fast LoRA beside a checkpoint: which paths it is used for, with which settings, and that it leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_checkpoint
from torch import Tensor
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.cli import app
from unidiffuser.path import NoisePath
from unidiffuser.runtime.fast_lora import distilled_routes, fast_lora_of, route_of, student_settings
from unidiffuser.runtime.lora import Change, write_lora

LAYER = "in_blocks.0.attn.qkv"
ROUTES = {
    "text_to_image": {"steps": 4, "fewest": 2, "speeds": [1, 1]},
    "image_to_text": {"steps": 2, "fewest": 2, "speeds": [1, 1]},
    "joint": {"steps": 6, "fewest": 6, "speeds": [1, 2]},
}
ABOUT = {"distilled": ROUTES, "method": "lcm", "guidance": 1}


def write_student(checkpoint: Path, about: dict[str, Any] = ABOUT) -> Path:
    file = checkpoint.with_name(f"{checkpoint.stem}-fast.safetensors")
    generator = torch.Generator().manual_seed(0)
    change = Change(torch.randn(2, 48, generator=generator), torch.randn(144, 2, generator=generator))
    write_lora(file, {"uvit": {LAYER: change}}, about)
    return file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny_checkpoint(path)
    write_student(path)
    return path


@pytest.fixture
def model(checkpoint: Path) -> unidiffuser.UniDiffuser:
    return unidiffuser.load(checkpoint, device="cpu", dtype=torch.float32)


def weights(model: unidiffuser.UniDiffuser) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def evaluations(model: unidiffuser.UniDiffuser) -> list[tuple[int, bool]]:
    """For each evaluation of the network from now on its rows, and whether the student's weights were in place."""
    before, seen = weights(model)[f"{LAYER}.weight"], list[tuple[int, bool]]()

    def note(net: torch.nn.Module, given: Any) -> None:
        seen.append((len(given[0]), not torch.equal(net.get_parameter(f"{LAYER}.weight"), before)))

    model.net.in_blocks[0].register_forward_pre_hook(lambda block, given: note(model.net, given))
    return seen


@pytest.mark.parametrize(
    ("path", "route"),
    [
        (NoisePath.text_to_image(4), "text_to_image"),
        (NoisePath.text_to_image(4, start=600.0), "text_to_image"),
        (NoisePath.text_to_image(4, hold=100.0), "text_to_image"),
        (NoisePath.text_to_image(4, hold=1000.0), "image"),
        (NoisePath.image(4), "image"),
        (NoisePath.image_to_text(4), "image_to_text"),
        (NoisePath.text(4), "text"),
        (NoisePath.joint(4, speeds=(1, 2)), "joint"),
        (NoisePath.from_points("1000,1000 400,0 0,0", 5), "joint"),
        (NoisePath.text_to_image(4).reversed(), "noising"),
    ],
)
def test_a_path_has_the_route_of_what_moves(path: NoisePath, route: str) -> None:
    assert route_of(path) == route


def test_it_is_found_beside_files_and_folders(tmp_path: Path) -> None:
    for name in ("a.safetensors", "uvit_v1.pth"):
        assert fast_lora_of(tmp_path / name) is None
        (tmp_path / f"{Path(name).stem}-fast.safetensors").write_bytes(b"")
        assert fast_lora_of(tmp_path / name) == tmp_path / f"{Path(name).stem}-fast.safetensors"
    (tmp_path / "unidiffuser-v1.0-fast.safetensors").write_bytes(b"")
    assert fast_lora_of(tmp_path / "unidiffuser-v1.0") == tmp_path / "unidiffuser-v1.0-fast.safetensors"


def test_settings_are_those_of_the_task() -> None:
    usual = {"guidance": 1.0, "method": "lcm"}
    assert student_settings(ABOUT, "f", ["text_to_image"]) == {"steps": 2, **usual}
    assert student_settings(ABOUT, "f", ["image_to_text", "text_to_image"]) == {"steps": 2, **usual}
    assert student_settings(ABOUT, "f", ["joint"]) == {"steps": 6, "speeds": (1.0, 2.0), **usual}
    for routes in ([], ["image"], ["joint", "text"]):
        assert student_settings(ABOUT, "f", routes) is None
    assert student_settings({}, "f", ["joint"]) is None


@pytest.mark.parametrize(
    "routes",
    [[1], "joint", {"joint": 4}, {"joint": {"steps": 0, "speeds": [1, 1]}}, {"joint": {"steps": 4, "speeds": 5}},
     {"joint": {"steps": True, "speeds": [1, 1]}}, {"joint": {"steps": 10**9, "speeds": [1, 1]}}],
)  # fmt: skip
def test_damaged_metadata_is_one_sentence(routes: Any) -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: its distilled tasks are not readable"):
        distilled_routes({"distilled": routes}, "x.safetensors")


def test_fast_means_the_student_and_exact_leaves_no_trace(model: unidiffuser.UniDiffuser) -> None:
    (exact,), original = model.text_to_image("a", steps=4), weights(model)
    seen = evaluations(model)
    (fast,) = model.text_to_image("a", preset="fast")
    assert seen == [(1, True)] * 2  # one row: no guidance
    assert fast.tobytes() != exact.tobytes()
    seen.clear()
    assert model.text_to_image("a", steps=4)[0].tobytes() == exact.tobytes()
    assert [changed for _, changed in seen] == [False] * 4
    assert all(torch.equal(value, original[name]) for name, value in weights(model).items())
    assert model.text_to_image("a", preset="fast")[0].tobytes() == fast.tobytes()


@pytest.mark.parametrize(
    ("call", "steps"),
    [
        (lambda m: m.image_to_text(m.image(steps=1)[0], preset="fast"), [2]),
        (lambda m: m.joint(preset="fast"), [6]),
        (lambda m: m.text_to_image("a", preset="fast", steps=4), [4]),
        (lambda m: m.vary_text("a", preset="fast"), [2, 2]),
        (lambda m: m.gibbs("a", rounds=2, preset="fast"), [2] * 4),
        (lambda m: m.img2img(m.image(steps=1)[0], "a", preset="fast"), [2]),
        (lambda m: m.sample(NoisePath.joint(3), preset="fast"), [3]),
    ],
)
def test_every_learnt_path_uses_the_student(model: unidiffuser.UniDiffuser, call: Any, steps: list[int]) -> None:
    seen = evaluations(model)
    call(model)
    assert [rows for rows, changed in seen if changed] == [1] * sum(steps)


def test_paths_that_it_has_not_learnt_use_the_network_alone(model: unidiffuser.UniDiffuser) -> None:
    for call in (
        lambda: model.image(preset="fast"),
        lambda: model.text(preset="fast"),
        lambda: model.invert(model.image(steps=1)[0], "a", preset="fast", steps=3),
        lambda: model.reconstruct(model.image(steps=1)[0], "a", preset="fast", steps=3),
    ):
        seen = evaluations(model)
        call()
        assert seen
        assert not any(changed for _, changed in seen)
    half = model.resolve({"preset": "fast"}, "image")
    assert half["steps"] == model.resolve({})["steps"] // 2


def test_a_file_that_is_no_student_is_told_by_fast_alone(checkpoint: Path) -> None:
    write_student(checkpoint, {})
    model = unidiffuser.load(checkpoint, device="cpu", dtype=torch.float32)
    model.text_to_image("a", steps=1)
    with pytest.raises(ValueError, match=r"tiny-fast\.safetensors is beside a checkpoint .* lists no distilled tasks"):
        model.text_to_image("a", preset="fast")


def test_it_adds_up_with_other_loras_and_has_no_words(model: unidiffuser.UniDiffuser, tmp_path: Path) -> None:
    other = tmp_path / "style.safetensors"
    write_lora(other, {"uvit": {LAYER: Change(torch.ones(1, 48), torch.ones(144, 1))}}, {"words": ["zorbi"]})
    original, known = weights(model), model._loras.extend(model.vocabulary)
    model.text_to_image("a", preset="fast")
    assert model._loras.extend(model.vocabulary) == known
    student = weights(model)[f"{LAYER}.weight"] - original[f"{LAYER}.weight"]
    model.load_lora(other)
    torch.testing.assert_close(weights(model)[f"{LAYER}.weight"], original[f"{LAYER}.weight"] + student + 1)
    with pytest.raises(ValueError, match=r"style.safetensors$"):
        model.unload_lora("another")
    model.unload_lora()
    assert all(torch.equal(value, original[name]) for name, value in weights(model).items())


def test_the_command_says_what_it_used(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--preset", "fast", "--out", str(out), "--json", "-q", "-n", "1"]
    done = CliRunner().invoke(app, ["joint", *arguments])
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout)["settings"]
    assert (settings["steps"], settings["guidance"], settings["method"], settings["speeds"]) == (6, 1.0, "lcm", [1.0, 2.0])
