"""Checkpoints: reading of three layouts, conversion to one file, and refusal of other files."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CONFIG, V0, metadata, write_diffusers, write_openai_clip, write_original
from safetensors.torch import load_file, save_file

import unidiffuser
from unidiffuser.checkpoints.checkpoint import ModelConfig, convert, load_checkpoint, save_checkpoint
from unidiffuser.checkpoints.config import V1
from unidiffuser.checkpoints.export import export_original
from unidiffuser.checkpoints.fields import checked_config
from unidiffuser.checkpoints.skeleton import assign_weights, skeleton
from unidiffuser.checkpoints.tokenizers import END, START
from unidiffuser.checkpoints.vocabulary import Vocabulary
from unidiffuser.checkpoints.weights import windows
from unidiffuser.encoders.clip import ImageTokenEncoder, TextEncoder
from unidiffuser.uvit import UViT

ALL = ("uvit", "vae", "clip_text", "clip_image", "caption")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_original(folder)
    return folder


@pytest.fixture(scope="module")
def ours(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "model.safetensors"
    convert(original, path)
    return path


# ---- Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [V0, CONFIG], ids=["v0", "v1"])
def test_original_to_ours_to_original_is_bit_exact(config: ModelConfig, tmp_path: Path) -> None:
    contents = write_original(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "model.safetensors")
    written = export_original(load_checkpoint(tmp_path / "model.safetensors"), tmp_path / "out")
    assert {path.name for path in written} == contents.keys()
    for path in written:
        state = torch.load(path, weights_only=True)
        assert state.keys() == contents[path.name].keys()
        for name, tensor in contents[path.name].items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name
        assert path.stat().st_size < 1.1 * (tmp_path / "in" / path.name).stat().st_size  # shared storages stay shared


def test_sizes_of_an_original_folder_are_inferred(original: Path) -> None:
    checkpoint = load_checkpoint(original)
    assert checkpoint.parts() == ALL
    assert checkpoint.config == CONFIG
    assert load_checkpoint(original / "uvit_v1.pth").config == CONFIG


def test_own_file_lists_the_tensors_of_a_part_by_name(ours: Path) -> None:
    """The same model is the same file, whatever the order of its source."""
    with ours.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = [name.split(".", 1) for name in header if name != "__metadata__"]
    for part in ALL:
        listed = [name for owner, name in names if owner == part]
        assert listed == sorted(listed)


def test_own_file_holds_config_and_tokenizers(ours: Path) -> None:
    checkpoint = load_checkpoint(ours)
    assert checkpoint.parts() == ALL
    assert checkpoint.config == CONFIG
    texts = metadata(ours)
    assert (texts["format"], texts["version"]) == ("unidiffuser", "1")
    assert len(json.loads(texts["clip_tokenizer"])["vocab"]) == 49408
    assert json.loads(texts["gpt2_tokenizer"])["vocab"]["<|EOS|>"] == 50257
    assert not [name for name in load_file(ours) if "lm_head" in name or "masked_bias" in name or "module" in name]


@pytest.mark.parametrize("save", [{}, {"safe_serialization": False}, {"max_shard_size": "150KB"}], ids=["st", "bin", "shards"])
def test_diffusers_folder_to_ours_is_equal(save: dict[str, Any], tmp_path: Path) -> None:
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    pipeline = write_diffusers(folder, **save)
    if "max_shard_size" in save:
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    convert(folder, path)
    checkpoint = load_checkpoint(path)

    wanted = replace(CONFIG, clip_image=CONFIG.clip_image | {"image_mean": [0.4, 0.5, 0.6]})
    assert checkpoint.config == wanted  # gelu_new included, against what the folder says of the caption decoder
    assert checkpoint.clip_tokenizer().encode("an Elephant") == pipeline.clip_tokenizer("an Elephant").input_ids[1:-1]
    assert checkpoint.gpt2_tokenizer().encode("<|EOS|>") == [50257]

    ours = {part: checkpoint.state_dict(part) for part in ALL}
    unet = pipeline.unet.state_dict()
    block = "transformer.transformer_out_blocks.1"
    qkv = [unet[f"{block}.block.attn1.to_{x}.weight"] for x in "qkv"]
    assert torch.equal(ours["uvit"]["out_blocks.1.attn.qkv.weight"], torch.cat(qkv))
    assert torch.equal(ours["uvit"]["out_blocks.1.norm1.bias"], unet[f"{block}.skip.norm.bias"])
    for part, model in (("clip_image", pipeline.image_encoder), ("caption", pipeline.text_decoder)):
        theirs = {re.sub(r"^transformer\.", "gpt.", name): t for name, t in model.state_dict().items()}
        assert ours[part].keys() == theirs.keys() - {"gpt.lm_head.weight"}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours[part].items())
    text = {name.removeprefix("text_model."): t for name, t in pipeline.text_encoder.state_dict().items()}
    assert ours["clip_text"].keys() == {f"text_model.{name}" for name in text}
    assert all(torch.equal(tensor, text[name.removeprefix("text_model.")]) for name, tensor in ours["clip_text"].items())
    numbers = sum(p.numel() for p in pipeline.vae.parameters())
    assert sum(t.numel() for t in ours["vae"].values()) == numbers


def test_openai_names_of_clip_are_converted(tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    text, image = write_openai_clip(tmp_path / "clip.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    for part, model in (("clip_text", text), ("clip_image", image)):
        state = checkpoint.state_dict(part)
        theirs = {(name if part == "clip_image" or name.startswith("text_model.") else f"text_model.{name}"): t
                  for name, t in model.state_dict().items()}  # fmt: skip
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[name], theirs[name]) for name in theirs)


def test_the_matching_tower_of_a_whole_clip_model_is_used(tmp_path: Path) -> None:
    """Published CLIP repositories hold both towers; one is needed for text, another for images."""
    from transformers import CLIPConfig, CLIPModel

    write_original(tmp_path, clip=False)
    other = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    picture = {name: value for name, value in CONFIG.clip_image.items() if not name.startswith("image_m")}
    words = CONFIG.clip_text | {"num_attention_heads": 4}
    for name, text, image, width in (("a", words, other, 24), ("b", other, picture, 16)):
        config = CLIPConfig(text_config=text, vision_config=image, projection_dim=width)
        CLIPModel(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves it
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.parts() == ALL
    assert checkpoint.config.clip_text == words  # config.json's, not the usual width
    assert checkpoint.config.clip_image == CONFIG.clip_image
    TextEncoder.from_checkpoint(checkpoint)
    ImageTokenEncoder.from_checkpoint(checkpoint)


def test_another_clip_of_the_same_projection_is_not_used(tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    b16 = replace(CONFIG, clip_image=CONFIG.clip_image | {"patch_size": 16})
    write_openai_clip(tmp_path / "ViT-B-16.safetensors", b16)
    with pytest.raises(FileNotFoundError, match="clip-vit-base-patch32"):
        load_checkpoint(tmp_path).state_dict("clip_image")


def test_partial_checkpoint_fails_only_where_a_part_is_needed(tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.parts() == ("uvit", "vae", "caption")
    assert checkpoint.state_dict("uvit")
    with pytest.raises(FileNotFoundError, match=r"CLIP text encoder.*openai/clip-vit-large-patch14"):
        checkpoint.state_dict("clip_text")
    convert(tmp_path, tmp_path / "part.safetensors")
    assert load_checkpoint(tmp_path / "part.safetensors").parts() == ("uvit", "vae", "caption")


def test_a_damaged_neighbour_is_named_when_its_part_is_needed(tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    (tmp_path / "clip.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileNotFoundError, match=r"Skipped: .*clip\.safetensors is a git-lfs pointer"):
        load_checkpoint(tmp_path).state_dict("clip_image")


def test_two_networks_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    write_original(tmp_path, V0, clip=False)
    with pytest.raises(ValueError, match="give the path of the one you want"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "uvit_v0.pth").config.uvit.data_types == 0


# ---- Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(ours: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(ours, tmp_path / "a.safetensors", dtype)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    first, second, exact = (load_file(path) for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors", ours))
    assert first.keys() == second.keys() == exact.keys()
    for name, tensor in first.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[name].to(dtype)), name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    loaded = load_checkpoint(ours).state_dict("vae", dtype=dtype)
    assert all(torch.equal(tensor, first[f"vae.{name}"]) for name, tensor in loaded.items())


def test_unchanged_dtype_keeps_every_bit(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45, 65504.0])
    tensors = {name: odd.to(dtype) for name, dtype in (("a", torch.float32), ("b", torch.float16), ("c", torch.bfloat16))}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "strided": torch.arange(6.0).reshape(2, 3).T}
    save_checkpoint(tmp_path / "x.safetensors", CONFIG, {"uvit": tensors})
    for name, tensor in load_checkpoint(tmp_path / "x.safetensors").state_dict("uvit").items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert bytes(tensor.contiguous().reshape(-1).view(torch.uint8)) == bytes(
            tensors[name].contiguous().reshape(-1).view(torch.uint8)
        )


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uvit\.big.*bfloat16"):
        save_checkpoint(tmp_path / "x.safetensors", CONFIG, {"uvit": {"big": torch.tensor([1e6])}}, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_windows_keep_order_and_limit(sizes: dict[str, int], limit: int) -> None:
    groups = list(windows(sizes, limit))
    assert [name for group in groups for name in group] == list(sizes)
    assert all(group and (len(group) == 1 or sum(sizes[name] for name in group) <= limit) for group in groups)


@given(
    st.builds(
        lambda side, patch, heads, width, types, defaults: replace(
            CONFIG,
            uvit=replace(CONFIG.uvit, img_size=(side * patch, patch), patch_size=patch, num_heads=heads,
                         embed_dim=2 * heads * width, data_types=types),
            defaults=defaults,
        ),
        st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3),
        st.dictionaries(st.text(max_size=4), st.integers() | st.floats(allow_nan=False)),
    )
)  # fmt: skip
@settings(max_examples=50)
def test_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_takes_absent_sections_from_v1_and_ignores_new_fields() -> None:
    assert ModelConfig.from_dict({"later": 1, "uvit": {"later": 2}}) == V1
    with pytest.raises(ValueError, match="'vae' must be an object"):
        ModelConfig.from_dict({"vae": 3})


def test_a_vocabulary_survives_saving_and_converting(ours: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary(("red apple", "猫"), ("flat",), ("a",), {"kitten": ("猫",)})
    checkpoint = load_checkpoint(ours)
    assert checkpoint.config.vocabulary is None  # published checkpoints list none
    assert "vocabulary" not in checkpoint.config.to_dict()
    weights = {name: checkpoint.state_dict(name) for name in checkpoint.parts()}
    save_checkpoint(tmp_path / "saved.safetensors", replace(checkpoint.config, vocabulary=vocabulary), weights)
    convert(tmp_path / "saved.safetensors", tmp_path / "converted.safetensors", torch.float16)
    for name in ("saved", "converted"):
        assert load_checkpoint(tmp_path / f"{name}.safetensors").config.vocabulary == vocabulary


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (["cat"], "'vocabulary' must be an object"),
        ({}, "'concepts' must be a list of at least one"),
        ({"concepts": "cat"}, "'concepts' must be a list"),
        ({"concepts": ["cat", 3]}, "'concepts' must hold texts"),
        ({"concepts": ["cat", " "]}, "'concepts' must hold texts"),
        ({"concepts": ["c" * 101]}, "'concepts' must hold texts"),
        ({"concepts": ["cat"] * 100_001}, "'concepts' must be a list of at most"),
        ({"concepts": ["cat"], "styles": {"flat": 1}}, "'styles' must be a list"),
        ({"concepts": ["cat"], "synonyms": ["kitten"]}, "'synonyms' must be an object"),
        ({"concepts": ["cat"], "synonyms": {"kitten": "cat"}}, "'synonyms' must be a list"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(vocabulary: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({"vocabulary": vocabulary})
    assert ModelConfig.from_dict({"vocabulary": None}) == V1


# ---- Writing --------------------------------------------------------------------------------------------------------


def test_full_disk_leaves_the_old_file_and_nothing_else(ours: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    target = tmp_path / "model.safetensors"
    target.write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            convert(ours, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert target.read_text() == "precious"


def test_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unidiffuser.checkpoints.layout_own._cast", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "x.safetensors", CONFIG, {"uvit": {"a": torch.zeros(2)}})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_can_be_converted_onto_itself(ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ours.read_bytes())
    convert(path, path, torch.float16)
    assert load_checkpoint(path).state_dict("vae")["quant_conv.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: convert(p, "model.pth"), "should end in .safetensors"),
        (lambda p: convert(p, p.with_name("x.safetensors"), torch.int8), "float32, float16 or bfloat16"),
        (lambda p: save_checkpoint(p.with_name("x.safetensors"), CONFIG, {"unet": {}}), "'unet' is neither a part"),
        (lambda p: save_checkpoint(p.with_name("x.safetensors"), CONFIG, {}, {"t5": {}}), "'t5' is neither a part"),
        (lambda p: load_checkpoint(p).state_dict("unet"), "no part 'unet'"),
    ],
)
def test_mistakes_in_calls(ours: Path, call: Callable[[Path], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(ours)
    assert not ours.with_name("x.safetensors").exists()


# ---- Loading into a module ------------------------------------------------------------------------------------------


def test_wrong_tensors_are_named_with_their_file(tmp_path: Path) -> None:
    state = UViT(CONFIG.uvit).state_dict()
    del state["norm.weight"], state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 2, 3)
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, CONFIG, {"uvit": state})
    with skeleton():
        network = UViT(CONFIG.uvit)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_checkpoint(path).load_into(network, "uvit")
    text = str(caught.value)
    for words in (
        str(path), "2 missing (first: norm.weight)", "1 unexpected (first: extra)",
        "1 misshapen (first: pos_embed is (1, 2, 3), should be (1, 96, 64))",
        "huggingface.co/thu-ml/unidiffuser-v1", "AGPL-3.0",
    ):  # fmt: skip
        assert words in text


def test_skeleton_keeps_tables_and_assigned_weights_keep_ties() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("table", torch.arange(3), persistent=False)
            self.register_buffer("kept", torch.zeros(2))

    with skeleton():
        module = Tied()
    assert module.embed.weight.is_meta
    assign_weights(module, {"embed.weight": torch.ones(3, 2), "kept": torch.full((2,), 5.0)}, "here")
    assert module.head.weight is module.embed.weight
    assert module.table.tolist() == [0, 1, 2]
    assert module.kept.tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match=r"here .* 1 missing \(first: kept\)"):
        assign_weights(module, {"embed.weight": torch.ones(3, 2)}, "here")


def test_writing_to_loaded_weights_does_not_change_the_file(ours: Path) -> None:
    before = ours.read_bytes()
    load_checkpoint(ours).state_dict("vae")["quant_conv.bias"].add_(1)
    assert ours.read_bytes() == before


# ---- Files that are no checkpoints ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil_was_here",)


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(b"\n<!DOCTYPE html><html>Sign in"), "is a web page"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_text("version https://git-lfs.github.com"), "git lfs pull"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(b""), "is empty"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(b"12345678901234567890"), "neither a safetensors nor"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(b"\x80\x02garbage"), "refused: it is damaged"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(pickle.dumps(Evil(), 2)), "refused.*asks for posix.system"),
        ("uvit_v1.pth", lambda d: (d / "uvit_v1.pth").write_bytes(pickle.dumps(Evil())), "refused: .*a pickle of something"),
        ("uvit_v1.pth", lambda d: torch.save({"a": Evil()}, d / "uvit_v1.pth"), "refused.*asks for posix.system"),
        ("uvit_v1.pth", lambda d: torch.save([torch.zeros(1)], d / "uvit_v1.pth"), "no plain state dict"),
        ("uvit_v1.pth", lambda d: torch.save({"a": torch.zeros(1)}, d / "uvit_v1.pth"), "pos_embed is missing"),
        ("x.safetensors", lambda d: save_file({"a": torch.zeros(1)}, d / "x.safetensors"), r"pos_embed is missing.*: a,"),
        ("x.pth", lambda d: (d / "x.pth").mkdir(), "neither model_index.json"),
        ("folder", lambda d: (d / "folder").mkdir(), "neither model_index.json"),
        ("nothing", lambda d: None, "neither a bundled one"),
    ],
)
def test_no_checkpoint(name: str, make: Callable[[Path], Any], words: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_checkpoint(tmp_path / name)
    assert name in str(caught.value)
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize("name", ["uvit_v1.pth", "autoencoder_kl.pth", "caption_decoder.pth"])
def test_truncated_original(name: str, tmp_path: Path) -> None:
    write_original(tmp_path, clip=False)
    (tmp_path / name).write_bytes(_truncated((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [5, 500, 5_000_000])
def test_truncated_safetensors(keep: int, ours: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(ours.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors is (damaged|neither)"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "2"}, "format version '2'"),
        ({"config": "{"}, "metadata of .* damaged"),
        ({"config": "[]"}, "metadata of .* damaged"),
        ({"config": '{"uvit": {"embed_dim": 7}}'}, "metadata of .* damaged"),
        ({"clip_tokenizer": "{"}, "metadata of .* damaged"),
        ({"config": "[" * 100_000}, "nested too deeply"),
        ({"config": '{"uvit": {"depth": ' + "9" * 5000 + "}}"}, "the config is not valid JSON"),
        ({"config": '{"vae": {"scale_factor": "0.2"}}'}, "vae.scale_factor must be a number, not '0.2'"),
        ({"config": '{"vae": {"scale_factor": NaN}}'}, "vae.scale_factor must be a number, not nan"),
        ({"config": '{"vae": {"ddconfig": {"ch_mult": [1, "2"]}}}'}, "vae.ddconfig.ch_mult must be a whole number"),
        ({"config": '{"clip_image": {"image_mean": 0.5}}'}, "clip_image.image_mean must be a list"),
        ({"config": '{"caption": {"gpt2": {"n_embd": -1}}}'}, "caption.gpt2.n_embd must be a whole number, not -1"),
        ({"config": '{"vae": {"scale_factor": 18446744073709551616}}'}, "vae.scale_factor must be a number"),
        (
            {"config": json.dumps({"vae": {"ddconfig": {k: v for k, v in V1.vae.ddconfig.items() if k != "ch"}}})},
            "ch is missing",
        ),
        (
            {"config": '{"clip_text": {"eos_token_id": 1000000000000000000000}}'},
            "clip_text.eos_token_id must be a whole number",
        ),
        ({"config": '{"defaults": {"steps": true}}'}, "defaults.steps must be a whole number, not True"),
        ({"config": '{"image_size": 1000000}'}, "image_size must be 1 to 8192 pixels"),
        ({"config": '{"uvit": {"num_text_tokens": 1000000000}}'}, "ask for 1000001028 positions, but pos_embed has 0"),
    ],
)
def test_damaged_metadata(change: dict[str, str], words: str, tmp_path: Path) -> None:
    texts = {"format": "unidiffuser", "version": "1", "config": "{}"} | change
    save_file({"uvit.a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=texts)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"uvit": {"depth": 10**6}}, "uvit.depth asks for 500000 layers, but the file has tensors for 1"),
        ({"uvit": {"depth": 4.5}}, "uvit.depth"),
        ({"uvit": {"detail_width": 8, "detail_blocks": 10**6}}, "uvit.detail_blocks"),
        ({"vae": {"ddconfig": V1.vae.ddconfig | {"num_res_blocks": 10_000}}}, "vae.ddconfig.num_res_blocks"),
        ({"clip_text": {"num_hidden_layers": 10**9}}, "clip_text.num_hidden_layers"),
        ({"clip_text": {"max_position_embeddings": 10**12}}, "clip_text.max_position_embeddings asks for .* positions"),
        ({"clip_image": {"image_size": 10**9, "patch_size": 1}}, "clip_image.image_size"),
        ({"caption": {"gpt2": {"n_layer": 10**9}}}, "caption.gpt2.n_layer"),
        ({"caption": {"gpt2": {"num_hidden_layers": 10**9}}}, "caption.gpt2.num_hidden_layers"),
        ({"caption": {"gpt2": {"n_positions": 10**6}}}, "caption.gpt2.n_positions"),
        ({"caption": {"gpt2": {"n_layer": "12"}}}, "caption.gpt2.n_layer"),
    ],
)
def test_sizes_beyond_the_tensors_are_refused_before_anything_is_built(
    section: dict[str, Any], words: str, tmp_path: Path
) -> None:
    texts = {"format": "unidiffuser", "version": "1", "config": json.dumps(section)}
    save_file({"uvit.in_blocks.0.attn.qkv.weight": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=texts)
    with pytest.raises(ValueError, match=rf"x\.safetensors is damaged \({words}"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_fields_that_transformers_would_act_on_are_left_out() -> None:
    """Some name code to load, as `attn_implementation` does."""
    data = {"clip_text": {"hidden_size": 8, "attn_implementation": "owner/kernel"}, "caption": {"gpt2": {"auto_map": {}}}}
    assert checked_config(data) == {"clip_text": {"hidden_size": 8}, "caption": {"gpt2": {}}}


def test_parts_of_different_models_are_refused(ours: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(ours)
    weights = {name: checkpoint.state_dict(name) for name in checkpoint.parts()}
    for change, words in (
        ({"caption": replace(CONFIG.caption, hidden_dim=9)}, "caption.hidden_dim is 9, but uvit.text_dim needs 8"),
        ({"vae": replace(CONFIG.vae, patch_size=2)}, "vae.ddconfig.in_channels is 3, but vae.patch_size needs 12"),
        ({"clip_image": CONFIG.clip_image | {"image_std": [0.5, 0.5]}}, "clip_image.image_std must have a number for each"),
    ):
        save_checkpoint(tmp_path / "mixed.safetensors", replace(checkpoint.config, **change), weights)
        with pytest.raises(ValueError, match=rf"mixed\.safetensors cannot be used: .*{words}"):
            load_checkpoint(tmp_path / "mixed.safetensors")


def test_a_config_that_describes_no_network_names_its_part(ours: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(ours)
    weights = {name: checkpoint.state_dict(name) for name in checkpoint.parts()}
    config = replace(checkpoint.config, clip_text=CONFIG.clip_text | {"hidden_act": "no such function"})
    save_checkpoint(tmp_path / "bent.safetensors", config, weights)
    with pytest.raises(ValueError, match=r"CLIP text encoder of .*bent\.safetensors cannot be built from its configuration"):
        unidiffuser.load(tmp_path / "bent.safetensors", device="cpu").text_to_image("a")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"vocab": {START: 0, END: 60_000}, "merges": []}, "has the id 60000, which must be 0 to 49407"),
        ({"vocab": {START: 0, END: "1"}, "merges": []}, "has the id '1'"),
        ({"vocab": {START: 0}, "merges": []}, "endoftext.* is missing"),
        ({"vocab": {START: 0, END: 1}, "merges": [5]}, "a merge must be a text"),
        ({"vocab": [], "merges": []}, "a tokenizer must be given as"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_encoder(spec: dict[str, Any], words: str, ours: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(ours)
    weights = {name: checkpoint.state_dict(name) for name in checkpoint.parts()}
    save_checkpoint(tmp_path / "other.safetensors", checkpoint.config, weights, {"clip_tokenizer": spec})
    with pytest.raises(ValueError, match=rf"clip_tokenizer of .*other\.safetensors is damaged \(.*{words}"):
        load_checkpoint(tmp_path / "other.safetensors").clip_tokenizer()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("unet/config.json", {}, r"unet/config\.json is damaged \(num_attention_heads is missing\)"),
        ("unet/config.json", {"num_attention_heads": 0}, "num_heads 0"),
        ("vae/config.json", {"scaling_factor": [1]}, r"vae/config\.json is damaged \(scaling_factor must be a number"),
        ("text_encoder/config.json", {"text_config": 5}, "text_config must be an object"),
        ("text_encoder/config.json", {"hidden_act": 5}, "hidden_act must be a text"),
        ("text_decoder/config.json", {"n_head": "1", "prefix_length": 77}, "n_head must be a whole number"),
    ],
)
def test_damaged_settings_of_a_diffusers_folder(name: str, content: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path)


def test_shards_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for shard in ("../other.safetensors", "/etc/passwd", "..", "x" * 5000, "", 5):
        index = {"weight_map": {"a": shard}}
        (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which is no file beside it"):
            load_checkpoint(tmp_path)


def test_a_block_with_an_absurd_number_is_refused(tmp_path: Path) -> None:
    state = dict(UViT(CONFIG.uvit).state_dict())
    state["in_blocks.999999999.attn.qkv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "uvit_v1.pth")
    with pytest.raises(ValueError, match=r"uvit_v1\.pth: it has in_blocks\.999999999, but only 3 such modules"):
        load_checkpoint(tmp_path)


def test_incomplete_network_names_the_missing_tensor(tmp_path: Path) -> None:
    state = dict(UViT(CONFIG.uvit).state_dict())
    del state["text_embed.weight"]
    torch.save(state, tmp_path / "uvit_v1.pth")
    with pytest.raises(ValueError, match=r"uvit_v1\.pth is incomplete: text_embed\.weight"):
        load_checkpoint(tmp_path)


def test_missing_shard_and_missing_config_of_a_diffusers_folder(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    save_file({"a": torch.zeros(1)}, unet / "one.safetensors")
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors is missing"):
        load_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_checkpoint(tmp_path)


def test_other_network_of_a_diffusers_folder_is_refused(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    save_file({"conv_in.weight": torch.zeros(1)}, unet / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is not the diffusion network of a UniDiffuser"):
        load_checkpoint(tmp_path)


def test_bundled_model_is_found_by_name_or_reported_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unidiffuser.checkpoints.checkpoint.ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no bundled model 'emoji'"):
        load_checkpoint("emoji")
    save_checkpoint(tmp_path / "emoji.safetensors", CONFIG, {"uvit": {"a": torch.zeros(1)}})
    assert load_checkpoint("emoji").parts() == ("uvit",)


# ---- Memory ---------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
import torch
from unidiffuser.checkpoints.checkpoint import convert, load_checkpoint
from unidiffuser.checkpoints.skeleton import skeleton
from unidiffuser.uvit import UViT

def resident(which):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))

source, task = sys.argv[1:]
torch.ones(8, 8).sum()
before = resident("VmRSS")
if task == "convert":
    convert(source, Path(source).with_name("half.safetensors"), torch.float16)
else:
    checkpoint = load_checkpoint(source)
    with skeleton():
        network = UViT(checkpoint.config.uvit)
    checkpoint.load_into(network, "uvit", dtype=None if task == "load" else getattr(torch, task))
    total = sum(parameter.sum() for parameter in network.parameters())  # touches every page
print((resident("VmHWM") - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network of about 200 MB in this project's layout and in the original one."""
    folder = tmp_path_factory.mktemp("large")
    config = replace(V1, uvit=replace(V1.uvit, img_size=16, embed_dim=1024, depth=2, num_heads=16))
    with torch.device("meta"):
        shapes = UViT(config.uvit).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    paths = {"ours": folder / "model.safetensors", "original": folder / "uvit_v1.pth"}
    save_checkpoint(paths["ours"], config, {"uvit": state})
    torch.save(state, paths["original"])
    return paths


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("layout", "task", "limit"),
    [
        ("ours", "load", 1.3), ("original", "load", 1.3), ("ours", "float16", 1.3), ("original", "bfloat16", 1.3),
        ("original", "convert", 0.8),
    ],
)  # fmt: skip
def test_peak_resident_memory(layout: str, task: str, limit: float, large: dict[str, Path]) -> None:
    size = large[layout].stat().st_size
    assert size > 150 << 20
    peaks: list[int] = []
    while len(peaks) < 3 and (not peaks or min(peaks) > limit * size):  # pages of the mapped file stay as the system likes
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(large[layout]), task],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": "."},
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert min(peaks) <= limit * size
