"""LoRA files: read, put on, taken off; refused when they belong to something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import write_tiny_checkpoint
from torch import Tensor, nn

import unidiffuser
from unidiffuser.cli.settings import _lora
from unidiffuser.runtime.lora import Change, apply_loras, read_lora, write_lora

QKV, SQUARE = "in_blocks.0.attn.qkv", "gpt.transformer.h.0.attn.c_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path


def change(out: int, inside: int, seed: int = 0, scale: float = 1.0) -> Change:
    generator = torch.Generator().manual_seed(seed)
    return Change(torch.randn(2, inside, generator=generator), torch.randn(out, 2, generator=generator), scale)


def weights(model: unidiffuser.UniDiffuser) -> dict[str, Tensor]:
    named = [*model.net.state_dict().items(), *model.captioner.state_dict().items()]
    return {name: tensor.clone() for name, tensor in named}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "both.safetensors"
    write_lora(path, {"uvit": {QKV: change(144, 48, scale=0.5)}, "caption": {SQUARE: change(32, 32, 1)}}, {"words": ["zorbi"]})
    return path


@pytest.mark.parametrize("built_before", [False, True])
def test_a_lora_adds_its_product_and_goes_without_a_trace(checkpoint: Path, file: Path, built_before: bool) -> None:
    plain = weights(unidiffuser.load(checkpoint, dtype=torch.float32))
    model = unidiffuser.load(checkpoint, dtype=torch.float32)
    if built_before:
        weights(model)
    model.load_lora(file, 0.7)
    now = weights(model)
    assert {name for name in plain if not torch.equal(plain[name], now[name])} == {f"{QKV}.weight", f"{SQUARE}.weight"}
    for name, expected in (
        (QKV, 0.5 * change(144, 48).up @ change(144, 48).down),
        (SQUARE, (change(32, 32, 1).up @ change(32, 32, 1).down).T),  # GPT-2 keeps (in, out)
    ):
        torch.testing.assert_close(now[f"{name}.weight"] - plain[f"{name}.weight"], 0.7 * expected, atol=1e-5, rtol=1e-5)
    model.unload_lora(file)
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(model).items())


def test_several_add_up_and_one_that_is_on_gets_the_new_strength(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_lora(other, {"uvit": {QKV: change(144, 48, 5)}}, {})
    model = unidiffuser.load(checkpoint, dtype=torch.float32, lora=[(file, 1.0), (other, 0.25)])
    plain = unidiffuser.load(checkpoint, dtype=torch.float32).net.get_parameter(f"{QKV}.weight")
    first, second = (0.5 * change(144, 48).up @ change(144, 48).down, change(144, 48, 5).up @ change(144, 48, 5).down)
    torch.testing.assert_close(model.net.get_parameter(f"{QKV}.weight") - plain, first + 0.25 * second, atol=1e-5, rtol=1e-5)
    model.load_lora(file, -1.0)
    torch.testing.assert_close(model.net.get_parameter(f"{QKV}.weight") - plain, 0.25 * second - first, atol=1e-5, rtol=1e-5)
    model.unload_lora(file)
    torch.testing.assert_close(model.net.get_parameter(f"{QKV}.weight") - plain, 0.25 * second, atol=1e-5, rtol=1e-5)
    model.unload_lora()
    assert torch.equal(model.net.get_parameter(f"{QKV}.weight"), plain)
    with pytest.raises(ValueError, match="is not applied"):
        model.unload_lora(other)


def test_pictures_change_and_come_back(checkpoint: Path, file: Path) -> None:
    model = unidiffuser.load(checkpoint, dtype=torch.float32)
    before = model.text_to_image("red", seed=3)[0].tobytes()
    model.load_lora(file)
    assert model.text_to_image("red", seed=3)[0].tobytes() != before
    model.unload_lora()
    assert model.text_to_image("red", seed=3)[0].tobytes() == before


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model.", "diffusion_model."])
@pytest.mark.parametrize("ending", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_names_of_other_trainers(checkpoint: Path, tmp_path: Path, prefix: str, ending: tuple[str, str]) -> None:
    c = change(144, 48)
    name = prefix + QKV
    save_file({f"{name}.{ending[0]}.weight": c.down, f"{name}.{ending[1]}.weight": c.up}, tmp_path / "a.safetensors")
    flat = "lora_unet_" + QKV.replace(".", "_")
    kohya = {f"{flat}.lora_down.weight": c.down, f"{flat}.lora_up.weight": c.up / 3, f"{flat}.alpha": torch.tensor(6.0)}
    save_file(kohya, tmp_path / "b.safetensors")
    files = [(tmp_path / name, 1.0) for name in ("a.safetensors", "b.safetensors")]
    models = [unidiffuser.load(checkpoint, dtype=torch.float32, lora=[file]) for file in files]
    made = [model.net.get_parameter(f"{QKV}.weight") for model in models]
    torch.testing.assert_close(made[0], made[1])


def test_what_is_no_lora_for_this_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model, path = unidiffuser.load(checkpoint, dtype=torch.float32), tmp_path / "x.safetensors"
    before = weights(model)
    wrong = {
        "is not a LoRA": {"in_blocks.0.attn.qkv.weight": torch.zeros(144, 48)},
        "another network": {f"lora_unet_down_blocks_0.{e}.weight": torch.zeros(2, 2) for e in ("lora_up", "lora_down")},
        "diffusers' UniDiffuserModel": {
            f"unet.transformer.transformer_in_blocks.0.attn1.to_q.{e}.weight": torch.zeros(2, 2) for e in ("lora_A", "lora_B")
        },
        "another size": {f"{QKV}.lora_A.weight": torch.zeros(2, 64), f"{QKV}.lora_B.weight": torch.zeros(192, 2)},
        "is damaged": {f"{QKV}.lora_A.weight": torch.zeros(2, 48), f"{QKV}.lora_B.weight": torch.zeros(144, 3)},
        "unknown here, as caption_decoder.encode_prefix": {
            f"caption_decoder.encode_prefix.{e}.weight": torch.zeros(2, 2) for e in ("lora_A", "lora_B")
        },
    }
    for text, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=text):
            model.load_lora(path)
    with pytest.raises(FileNotFoundError):
        model.load_lora(tmp_path / "nowhere.safetensors")
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        model.load_lora(path)
    with pytest.raises(ValueError, match="finite"):
        model.load_lora(path, float("nan"))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_the_file_tells_about_itself(file: Path, checkpoint: Path) -> None:
    layers = {"uvit": {QKV: (144, 48)}, "caption": {SQUARE: (32, 32)}}
    lora = read_lora(file, layers)
    assert lora.about == {"words": ["zorbi"]}
    names = (f"diffusion_model.{QKV}", f"caption_decoder.{SQUARE}")
    assert set(load_file(file)) == {f"{name}.{end}.weight" for name in names for end in ("lora_A", "lora_B")}


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2)), max_size=5))
def test_any_history_ends_where_the_last_state_says(history: list[tuple[int, float]]) -> None:
    """Weights depend on what is on now, not on how it came to be."""
    original = {"layer.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).half()}
    module = nn.Module()
    module.layer = nn.Linear(3, 4, dtype=torch.float16)

    def lora(number: int):  # type: ignore[no-untyped-def]
        from unidiffuser.runtime.lora import LoRA

        return LoRA(str(number), {"uvit": {"layer": change(4, 3, number)}})

    for number, strength in history:
        apply_loras(module, "uvit", [(lora(number), strength)], original)
    apply_loras(module, "uvit", [], original)
    assert torch.equal(module.layer.weight, original["layer.weight"])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        (r"C:\a.safetensors", (r"C:\a.safetensors", 1.0)),
        (r"C:\a.safetensors:-1", (r"C:\a.safetensors", -1.0)),
    ],
)
def test_the_option_of_the_command_line(text: str, parsed: tuple[str, float]) -> None:
    assert _lora(text) == parsed
