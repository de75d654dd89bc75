"""What comes from outside: pictures in every form, devices and formats, configs, LoRA files, tables, two runs in one folder."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

import unidiffuser
from unidiffuser import NoisePath, Streams
from unidiffuser.checkpoints.weights import WeightFiles, disk_errors
from unidiffuser.data.captioned import read_beside
from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.media.images import open_image
from unidiffuser.options import check
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.runtime.lora import read_lora
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.distill_run import distill_config
from unidiffuser.training.fine_tune import fine_tune_config
from unidiffuser.training.lora_run import lora_config


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> UniDiffuser:
    return unidiffuser.load(tiny_checkpoint, device="cpu", dtype="float32")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_in_any_form_is_the_same_picture(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with (tmp_path / "a.png").open("rb") as file:
        opaque = np.dstack([levels, np.full((30, 40), 255, np.uint8)])
        tensor = torch.from_numpy(levels).permute(2, 0, 1) / 255
        files = (tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), io.BytesIO(data), file)
        for form in (Image.fromarray(levels), *files, levels, opaque, tensor):
            assert np.array_equal(np.asarray(open_image(form)), levels), type(form)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(np.full((2, 3), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "the picture is None; give a PIL image"),
        (5, "the picture is a int"),
        (np.zeros((4, 4, 3)), "an array of float64; give numpy uint8"),
        (np.zeros((3, 4, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (torch.zeros(5, 4, 4), r"tensor of shape \(5, 4, 4\)"),
        (torch.full((3, 4, 4), 255.0), "values from 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), "values from nan"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "tensor of torch.uint8"),
        (torch.zeros(3, 4, 4).to_sparse(), "a tensor without plain values"),
        (torch.zeros(3, 4, 4, device="meta"), "a tensor without plain values"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, 0, 4), "is empty"),
        (io.StringIO("text"), 'open it with "rb"'),
        (b"", "not a picture"),
    ],
)
def test_what_is_no_picture_says_what_would_be(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_image(given)


def test_tasks_take_batches_and_refuse_the_rest(model: UniDiffuser, tmp_path: Path) -> None:
    batch = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    captions = model.image_to_text(batch, steps=1)
    assert captions == model.image_to_text(list(batch), steps=1)
    assert captions == model.image_to_text(torch.from_numpy(batch).permute(0, 3, 1, 2) / 255, steps=1)
    for call, words in (
        (lambda: model.image_to_text(None), "the picture is None"),  # type: ignore[arg-type]
        (lambda: model.image_to_text([None, batch[0]]), "picture 1 of 2 is None"),  # type: ignore[list-item]
        (lambda: model.image_to_text(tmp_path), "is a folder; name one picture in it, or use `unidiffuser caption`"),
        (lambda: model.text_to_image(Image.new("RGB", (8, 8))), "a prompt must be a text, got a Image"),  # type: ignore[arg-type]
        (lambda: model.text_to_image(["a", 5]), "prompt 2 of 2 must be a text, got a int"),  # type: ignore[list-item]
        (lambda: model.text_to_image(None), "the prompt is None"),  # type: ignore[arg-type]
        (lambda: model.gibbs("cat.png"), r"pathlib\.Path\('cat\.png'\)"),
        (lambda: model.gibbs(batch), "one picture, got 2"),  # type: ignore[arg-type]
        (lambda: model.gibbs(["a", "b"]), "one prompt or picture, got a list of 2"),  # type: ignore[arg-type]
        (lambda: model.text_to_image("a", negative=5), "the negative prompt is a int"),  # type: ignore[arg-type]
        (lambda: model.text_to_image(["a", "b"], negative=["c", None]), "negative prompt 2 of 2 must be a text, got None"),  # type: ignore[list-item]
        (lambda: model.rewrite("a b", change=1.5), r"change must hold words of the text, or their positions from 0, got 1\.5"),  # type: ignore[arg-type]
        (lambda: model.rewrite("a b", keep=["a", None]), "keep must hold words .*got None"),  # type: ignore[list-item]
        (lambda: model.sample("1000,1000 0,0"), "path must be a NoisePath, such as"),  # type: ignore[arg-type]
        (lambda: model.sample(NoisePath.joint(1), latents={"img": 1}), "latents must be Streams, .* got a dict"),  # type: ignore[arg-type]
        (lambda: model.decode(None), "the latents must be Streams, .* got None"),  # type: ignore[arg-type]
        (lambda: model.decode(Streams(img=torch.zeros(3))), r"the stream img of the latents must be a tensor of 4 axes"),
        (lambda: model.text_to_image("a", data_type=5), "data_type must be 1"),
        (lambda: model.text_to_image("a", width=10**9), "width must be at most 8192, got 1000000000"),
        (lambda: model.text_to_image("a", steps=10**9), "steps must be at most 10000"),
        (lambda: model.load_lora(None), "name the LoRA as a text or path, got None"),  # type: ignore[arg-type]
        (lambda: model.load_lora("a.safetensors", "strong"), "strength of a LoRA must be a finite number, got 'strong'"),  # type: ignore[arg-type]
        (lambda: model.text_to_image("a", on_error="ignore"), "on_error must be one of raise, skip"),
        (lambda: model.text_to_image("a", progress="yes"), "progress must be"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((0, 5)), "the mask is empty"),
        (np.array([[None]]), "the mask holds object"),
        (np.array([["a"]]), "the mask holds <U1"),
        (torch.ones(5, 5, dtype=torch.complex64), "the mask holds torch.complex64"),
        (torch.ones(5, 5, device="meta"), "without plain values"),
        (np.ones((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (5, "the mask is a int"),
    ],
)
def test_what_is_no_mask_says_what_would_be(model: UniDiffuser, mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.inpaint(Image.new("RGB", (8, 8)), mask)


def test_options_are_checked_without_a_model() -> None:
    assert check({"steps": 5, "guidance": [2, 3]})["steps"] == 5  # type: ignore[typeddict-item]
    for wrong in (
        {"guidance": "3"},
        {"guidance": True},
        {"guidance_interval": 5},
        {"guidance_interval": (9, 1)},
        {"seed": "0"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check(wrong)  # type: ignore[arg-type]


# --- devices and formats ----------------------------------------------------------------------------------------------


def test_load_takes_names_of_formats_and_refuses_what_is_not_there(tiny_checkpoint: Path) -> None:
    assert unidiffuser.load(tiny_checkpoint, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    for dtype in ("float8", torch.int8, 16):
        with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, torch\.float16, torch\.bfloat16"):
            unidiffuser.load(tiny_checkpoint, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'toaster' cannot be used here"):
        unidiffuser.load(tiny_checkpoint, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
            unidiffuser.load(tiny_checkpoint, device="cuda")
    for lora in (5, "a.safetensors", {"a.safetensors": 1.0}, ["a.safetensors"]):
        with pytest.raises(ValueError, match="lora must be a list of files with their strengths"):
            unidiffuser.load(tiny_checkpoint, device="cpu", lora=lora)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offload must be True or False, got 'yes'"):
        unidiffuser.load(tiny_checkpoint, device="cpu", offload="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name the model as a text or path"):
        unidiffuser.load(None)  # type: ignore[arg-type]


def test_a_model_moves_to_another_format(tiny_checkpoint: Path) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    before = model.text_to_image("red", steps=1, output="latent")
    assert model.to(torch.bfloat16) is model
    assert (model.dtype, model.net.pos_embed.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.to("cpu").dtype == torch.bfloat16
    assert model.to("cpu", "float32").net.pos_embed.dtype == torch.float32
    after = model.text_to_image("red", steps=1, output="latent")
    assert torch.equal(before.need("img"), after.need("img"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot be used here"):
        model.to("toaster")


def test_parts_built_in_inference_mode_are_normal_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        pairs = model.joint(steps=1)
        model.vary_image(pairs[0][0], steps=1)
    clip = (model.image_token_encoder.clip, model.text_encoder.clip, model.text_encoder.encode_prefix)
    for part in (model.net, model.captioner, model.autoencoder.vae, *clip):
        assert not [name for name, value in [*part.named_parameters(), *part.named_buffers()] if value.is_inference()]
    name = next(name for name in model.net.state_dict() if name.endswith("qkv.weight"))
    out, inside = model.net.state_dict()[name].shape
    matrices = {f"diffusion_model.{name.removesuffix('.weight')}.lora_{k}.weight": torch.ones(shape)
                for k, shape in (("A", (1, inside)), ("B", (out, 1)))}  # fmt: skip
    save_file(matrices, tmp_path / "lora.safetensors")
    plain = model.net.get_parameter(name).clone()
    model.load_lora(tmp_path / "lora.safetensors")
    assert torch.allclose(model.net.get_parameter(name), plain + 1, atol=1e-6)
    with torch.inference_mode():
        model.unload_lora()
    assert not model.net.get_parameter(name).is_inference()
    sum(p.sum() for p in model.net.parameters()).backward()  # type: ignore[union-attr]
    assert model.net.get_parameter(name).grad is not None


# --- files of settings ------------------------------------------------------------------------------------------------


def train_config(tmp_path: Path, text: str) -> TrainConfig:
    (tmp_path / "a.yaml").write_text(f"stage: latents\nout: {tmp_path}\n{text}", encoding="utf-8")
    return TrainConfig.from_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("config", [lora_config, fine_tune_config, distill_config])
def test_settings_of_the_training_commands_are_in_range(tmp_path: Path, config: Any) -> None:
    """A command line may say nan, which no lower bound refuses."""
    assert config(tmp_path, learning_rate=1e-3).learning_rate == 1e-3
    for name, value in (
        ("learning_rate", float("nan")),
        ("learning_rate", -1.0),
        ("steps", 0),
        ("batch_size", 0),
        ("decay", 2.0),
    ):
        with pytest.raises(ValueError, match=f"the settings of the training: {name} must be"):
            config(tmp_path, **{name: value})


def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path: Path) -> None:
    config = train_config(tmp_path, "learning_rate: 2e-4\nbetas: [0.9, 1e-1]\nweight_decay: 0\npeak_tflops: null\n")
    assert config.learning_rate == 2e-4
    assert config.betas == (0.9, 0.1)
    assert config.peak_tflops is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: null", "steps must be a whole number, got null"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("steps: true", "steps must be a whole number, got True"),
        ("betas: 0.9", "betas must be 2 values in brackets"),
        ("betas: [0.9]", "betas must be 2 values"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: [1]", "learning_rate must be a number"),
        ("compile: 'yes please'", "compile must be true or false"),
        ("options: 5", "options must be a mapping"),
        ("learning_rate: -1", "learning_rate must be a number from 0 to 100, got -1"),
        ("learning_rate: .nan", "learning_rate must be a number from 0 to 100, got nan"),
        ("betas: [0.9, 1]", r"betas\[1\] must be a number from 0 to"),
        ("ema_decay: 2", "ema_decay must be a number from 0 to"),
        ("decay: 7", "decay must be a number from 0 to 1, got 7"),
        ("max_grad_norm: 0", "max_grad_norm must be a number from"),
        ("warmup_steps: -5", "warmup_steps must be at least 0"),
        ("workers: -3", "workers must be at least 0"),
        ("steps: 99999999999999999999", "steps must be at most 1000000000"),
        ("steps: [1", r"line \d+, column \d+ is not YAML"),
        ("\tsteps: 1", "is not YAML"),
        ("when: 2026-99-99", "is not YAML|unknown settings"),
        ("stage: !!python/object:os.system x", "is not YAML"),
        ("steps: !!timestamp x", "is not YAML"),
        ("steps: " + "[" * 100_000, "nested too deeply"),
        ("steps: " + "x" * 5000, r"steps must be a whole number, got 'x{20,40}\.\.\.x{20,40}'$"),
    ],
)
def test_mistakes_in_a_training_config_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        train_config(tmp_path, text)
    assert "\n" not in str(error.value)
    assert "a.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: joint", "tasks must be a list, got 'joint'"),
        ("seeds: 0", "seeds must be a list"),
        ("seeds: [a]", "seeds must be a whole number, got 'a'"),
        ("data: pictures", "data must be a mapping"),
        ("batch: null", "batch must be a whole number, got null"),
        ("guidance: strong", "guidance must be a number, got 'strong'"),
        ("model: 5", "model must be a text, got 5"),
        ("guidance_sweep: {values: 3, split: all}", "guidance_sweep: values must be a list"),
        ("retrieval: {split: all, count: many}", "retrieval: count must be a whole number"),
        ("guidance: [1, 2, 3]", r"guidance must be one number or an \(image, text\) pair"),
        ("guidance: .nan", "guidance must be a finite number"),
        ("method: magic", "method must be one of"),
        ("steps_sweep: {values: [5, 0], split: all}", "steps must be a whole number of at least 1, got 0"),
        ("guidance_sweep: {values: [.inf], split: all}", "guidance must be a finite number"),
        ("data: [", "is not YAML"),
    ],
)
def test_mistakes_in_an_evaluation_config_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "e.yaml").write_text(text if "data" in text else f"data: {{format: folder}}\n{text}", encoding="utf-8")
    with pytest.raises(ValueError, match=words) as error:
        EvaluationConfig.from_file(tmp_path / "e.yaml")
    assert "\n" not in str(error.value)


def test_numbers_of_an_evaluation_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("data: {format: folder}\nguidance: 3\nspeeds: [1, 2]\n", encoding="utf-8")
    config = EvaluationConfig.from_file(tmp_path / "e.yaml", ["steps=5"])
    assert (repr(config.guidance), repr(config.speeds), config.steps) == ("3", "[1, 2]", 5)


# --- files of tensors -------------------------------------------------------------------------------------------------

LAYER = "in_blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("down", "up", "alpha", "words"),
    [
        (torch.ones(8), torch.ones(4, 1), None, r"shape \(8,\)"),
        (torch.ones(0, 8), torch.ones(4, 0), None, r"shape \(0, 8\)"),
        (torch.ones(1, 8, dtype=torch.int8), torch.ones(4, 1), None, "torch.int8"),
        (torch.ones(1, 8), torch.full((4, 1), torch.nan), None, "NaN or infinity"),
        (torch.ones(1, 8), torch.ones(4, 1), torch.tensor(1 + 1j), "alpha"),
        (torch.ones(1, 8), torch.ones(4, 1), torch.ones(2), "alpha"),
        (torch.ones(1, 8), torch.ones(4, 1), torch.tensor(float("nan")), "alpha"),
    ],
)
def test_damaged_loras(tmp_path: Path, down: torch.Tensor, up: torch.Tensor, alpha: torch.Tensor | None, words: str) -> None:
    tensors = {f"diffusion_model.{LAYER}.lora_A.weight": down, f"diffusion_model.{LAYER}.lora_B.weight": up}
    if alpha is not None:
        tensors[f"diffusion_model.{LAYER}.alpha"] = alpha
    torch.save(tensors, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=rf"lora\.pt is damaged: .*{words}"):
        read_lora(tmp_path / "lora.pt", {"uvit": {LAYER: (4, 8)}})


def test_damaged_metadata_of_a_lora_is_named(tmp_path: Path) -> None:
    shapes = {"A": (1, 8), "B": (4, 1)}
    tensors = {f"diffusion_model.{LAYER}.lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    for text in ("{", "[1]", "[" * 100_000):
        save_file(tensors, tmp_path / "lora.safetensors", metadata={"unidiffuser_lora": text})
        with pytest.raises(ValueError, match=r"lora\.safetensors is damaged: its entry unidiffuser_lora .*JSON"):
            read_lora(tmp_path / "lora.safetensors", {"uvit": {LAYER: (4, 8)}})


def test_integer_weights_and_damaged_headers(tmp_path: Path, model: UniDiffuser) -> None:
    from unidiffuser.checkpoints.checkpoint import save_checkpoint

    weights = {name: tensor.to(torch.int8) for name, tensor in model.checkpoint.state_dict("uvit").items()}
    save_checkpoint(tmp_path / "int.safetensors", model.config, {"uvit": weights})
    with pytest.raises(ValueError, match=r"int\.safetensors holds int8 numbers, as .*; use float32"):
        _ = unidiffuser.load(tmp_path / "int.safetensors", device="cpu").net
    (tmp_path / "damaged.safetensors").write_bytes(b"\x80" + bytes(100))
    with pytest.raises(ValueError, match=r"damaged\.safetensors is (damaged|refused)"):
        WeightFiles(tmp_path / "damaged.safetensors")
    for junk in (b"\x80\x02}q\x00.", b"\x80\x02X\xff\xff\xff\xff", b"\x80\x04\x95" + bytes(9), b"PK\x03\x04" + bytes(30)):
        (tmp_path / "junk.pth").write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.pth"):
            WeightFiles(tmp_path / "junk.pth").open()["pos_embed"]


def test_a_full_disk_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match="No space left") as error, disk_errors():
        raise SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull }) (os error 28)")
    assert error.value.errno == errno.ENOSPC


def test_columns_of_another_type_make_a_table_unreadable(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from unidiffuser.data.filter import Rules, filter_tables

    (tmp_path / "in").mkdir()
    columns = {"struct": [{"a": 1}] * 2, "binary": [b"\xff\xfe"] * 2, "plain": ["a cat"] * 2}
    for name, captions in columns.items():
        table = pa.table({"URL": ["http://a"] * 2, "TEXT": captions})
        pq.write_table(table, tmp_path / f"in/{name}.parquet")
    count = filter_tables(tmp_path / "in", tmp_path / "out", Rules(min_caption=1))
    assert count.kept == 2
    assert count.unreadable.keys() == {"struct.parquet", "binary.parquet"}


# --- captions, and two runs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_unreadable_caption_is_counted(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.txt").chmod(0)
    (pair,) = read_beside(tmp_path)
    assert pair.problem == "unreadable caption"


def test_an_unreadable_caption_does_not_end_an_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from unidiffuser.data.encode import Encoding, _decoded
    from unidiffuser.data.sources import find_parts

    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a cat")
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "b.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    (part,) = find_parts(tmp_path)
    counts: Counter[str] = Counter()
    batches = list(_decoded(part, Encoding(8), counts))
    assert [key for batch in batches for key, _, _ in batch] == ["a.png", "c.png"]
    assert counts == {"read": 3, "unreadable caption": 1}


def test_a_second_training_in_one_folder_is_refused(tmp_path: Path) -> None:
    from unidiffuser.distributed import World
    from unidiffuser.training.loop import _alone

    alone = World(0, 1, torch.device("cpu"))
    unfinished = tmp_path / "run/checkpoints/.00000005.partial"
    unfinished.mkdir(parents=True)
    with _alone(tmp_path / "run", alone):
        assert not unfinished.exists()
        with pytest.raises(ValueError, match=r"the run folder .* is in use by process \d+ on"), _alone(tmp_path / "run", alone):
            pytest.fail("two runs at once")
        with _alone(tmp_path / "run", World(1, 2, torch.device("cpu"))):
            pass  # the other processes of the first run
