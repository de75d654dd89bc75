"""Bad input to the library: every case ends in an error that says what to do, or in a result where the input is legal.

The command line's side of it (exit codes, unwritable folders, full disks, Ctrl-C) is in test_cli.py.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unidiffuser
from unidiffuser.pipeline import UniDiffuser

STEPS = {"steps": 1}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> UniDiffuser:
    return unidiffuser.load(tiny_checkpoint, device="cpu")


def test_unknown_model() -> None:
    with pytest.raises(FileNotFoundError, match=r"no model 'emojy'.*emoji"):
        unidiffuser.load("emojy")


@pytest.mark.parametrize("share", [0.001, 0.2, 0.95])
def test_truncated_checkpoint(tiny_checkpoint: Path, tmp_path: Path, share: float) -> None:
    data = tiny_checkpoint.read_bytes()
    (tmp_path / "part.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"part\.safetensors"):
        unidiffuser.load(tmp_path / "part.safetensors").text_to_image("a")


@pytest.mark.parametrize("content", [b"", b"hello", b"<!DOCTYPE html><html>", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "uvit_v1.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"uvit_v1\.pth"):
        unidiffuser.load(tmp_path / "uvit_v1.pth").text_to_image("a")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, kind: str) -> None:
    path, trace = tmp_path / "uvit_v1.pth", tmp_path / "ran"
    if kind == "torch":
        torch.save({"pos_embed": Evil(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"pos_embed": Evil(trace)}))
    with pytest.raises(ValueError, match=r"uvit_v1\.pth"):
        unidiffuser.load(path).text_to_image("a")
    assert not trace.exists()


def test_wrong_shapes_are_named(tmp_path: Path, model: UniDiffuser) -> None:
    from unidiffuser.checkpoints.checkpoint import save_checkpoint

    weights = dict(model.checkpoint.state_dict("uvit"))
    weights["decoder_pred.bias"] = torch.zeros(3)
    weights.pop("norm.weight")
    save_checkpoint(tmp_path / "bent.safetensors", model.config, {"uvit": weights})
    with pytest.raises(ValueError, match=r"bent\.safetensors.*norm\.weight.*decoder_pred\.bias"):
        _ = unidiffuser.load(tmp_path / "bent.safetensors", device="cpu").net


@pytest.mark.parametrize("steps", [0, -3, 1.5, True])
def test_steps(model: UniDiffuser, steps: Any) -> None:
    with pytest.raises(ValueError, match="steps"):
        model.text_to_image("a", steps=steps)


@pytest.mark.parametrize("speeds", [1.0, (1.0,), (0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, "fast")])
def test_speeds(model: UniDiffuser, speeds: Any) -> None:
    with pytest.raises(ValueError, match="speeds must be"):
        model.joint(speeds=speeds, **STEPS)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), (1.0, float("nan")), (1.0, 2.0, 3.0)])
def test_guidance(model: UniDiffuser, guidance: Any) -> None:
    with pytest.raises(ValueError, match="guidance"):
        model.text_to_image("a", guidance=guidance, **STEPS)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"count": 0}, "count"), ({"count": 1.0}, "count"), ({"seed": 0.5}, "seed"), ({"method": "magic"}, "magic"),
        ({"method": "ddim_inverse"}, "method"),
        ({"width": 0}, "width"), ({"height": 33}, "height"), ({"batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_other_numbers(model: UniDiffuser, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        model.text_to_image("a", **STEPS, **options)


def test_unknown_option(model: UniDiffuser) -> None:
    with pytest.raises(TypeError, match=r"guidence.*guidance"):
        model.text_to_image("a", guidence=3.0)  # type: ignore[call-arg]


def test_the_empty_prompt_is_legal(model: UniDiffuser) -> None:
    assert len(model.text_to_image("", **STEPS)) == 1
    assert len(model.vary_text("", **STEPS)) == 1
    assert len(model.gibbs("", rounds=1, **STEPS)) == 1


def test_a_prompt_of_10_000_characters_is_cut_and_told(model: UniDiffuser, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "red apple " * 1000
    with caplog.at_level(logging.WARNING):
        long = model.text_to_image(prompt, **STEPS)
    (warning,) = (record.getMessage() for record in caplog.records if "prompt" in record.getMessage())
    assert "cut to the text encoder's limit" in warning
    assert len(warning) < 300
    assert np.array_equal(long[0], model.text_to_image(prompt + "and a pear", **STEPS)[0])


@pytest.mark.parametrize("prompt", ["\x00", "🍎" * 50, "مرحبا", "   \n\t ", "a\u0301" * 20])
def test_odd_characters(model: UniDiffuser, prompt: str) -> None:
    assert len(model.text_to_image(prompt, **STEPS)) == 1


def test_empty_lists(model: UniDiffuser) -> None:
    for call in (model.text_to_image, model.image_to_text, model.vary_image):
        with pytest.raises(ValueError, match="empty list"):
            call([])  # type: ignore[operator]


def odd_pictures() -> dict[str, Image.Image]:
    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    rotated = Image.new("RGB", (40, 30))
    rotated.getexif()[0x0112] = 6
    return {
        "1x1": Image.new("RGB", (1, 1)),
        "20000x3": Image.new("RGB", (20_000, 3)),
        "RGBA": Image.new("RGBA", (40, 30), (255, 0, 0, 100)),
        "16-bit": Image.fromarray(deep),
        "CMYK": Image.new("CMYK", (40, 30), (10, 20, 30, 40)),
        "palette": Image.new("RGB", (40, 30), "teal").quantize(8),
        "EXIF": rotated,
    }


@pytest.mark.parametrize("kind", odd_pictures())
def test_odd_pictures_are_captioned(model: UniDiffuser, tmp_path: Path, kind: str) -> None:
    image = odd_pictures()[kind]
    path = tmp_path / ("a.tiff" if kind == "CMYK" else "a.png")
    image.save(path, exif=image.getexif())
    assert len(model.image_to_text(path, **STEPS)) == 1


def test_missing_and_damaged_pictures(model: UniDiffuser, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        model.image_to_text(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        model.vary_image(tmp_path / "text.png")


def test_nan_is_named_with_its_step(tiny_checkpoint: Path) -> None:
    broken = unidiffuser.load(tiny_checkpoint, device="cpu")
    calls = 0

    def spoil(_: Any, __: Any, out: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        nonlocal calls
        calls += 1
        return tuple(x if x is None or calls < 3 else torch.full_like(x, float("nan")) for x in out)

    broken.net.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"img stream holds NaN or infinity at step 3 of 4"):
        broken.text_to_image("a", steps=4)
    with pytest.raises(ValueError, match=r"text stream.*step 1 of 4"):
        broken.image_to_text(Image.new("RGB", (8, 8)), steps=4)


def test_a_checkpoint_without_a_part_says_what_to_get(tmp_path: Path, model: UniDiffuser) -> None:
    from unidiffuser.checkpoints.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "net.safetensors", model.config, {"uvit": model.checkpoint.state_dict("uvit")})
    with pytest.raises(FileNotFoundError, match=r"CLIP text encoder.*clip-vit-large-patch14"):
        unidiffuser.load(tmp_path / "net.safetensors", device="cpu").text_to_image("a")
