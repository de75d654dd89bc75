"""Fine-tuning on a folder of captioned pictures: the data, the run, the checkpoint, and what the user is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import HEAD, write_tiny_checkpoint
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from unidiffuser.checkpoints.vocabulary import Vocabulary
from unidiffuser.cli import app, application
from unidiffuser.data.captioned import Pair
from unidiffuser.data.shards import LatentShards
from unidiffuser.encoders.prompts import unknown_words, with_captions
from unidiffuser.training import fine_tune_data, prior_data
from unidiffuser.training.fine_tune import FILE, fine_tune, fine_tune_config, fine_tune_stage, prepare
from unidiffuser.training.loop import train
from unidiffuser.training.prior_data import PRIOR
from unidiffuser.training.tuned import FineTuneStage

RED, GREEN = (200, 40, 30), (30, 180, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model that knows the words red, cat and noto; stored in float16."""
    plain = tmp_path_factory.mktemp("tiny") / "plain.safetensors"
    write_tiny_checkpoint(plain)
    opened = load_checkpoint(plain)
    config = replace(opened.config, vocabulary=Vocabulary(("red cat", "cat"), ("noto",)))
    parts = {part: opened.state_dict(part) for part in opened.parts()}
    path = plain.with_name("tiny.safetensors")
    save_checkpoint(path, config, parts, opened.tokenizer_specs(), torch.float16)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures with captions, one without, one damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour, caption in (("a", RED, "zor"), ("b", GREEN, "red cat, noto"), ("c", RED, "a zor with bim")):
        Image.new("RGB", (90, 70), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    Image.new("RGB", (90, 70), RED).save(folder / "bare.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "broken.txt").write_text("zor", encoding="utf-8")
    return folder


SMALL: dict[str, Any] = {"batch_size": 3, "learning_rate": 2e-3, "save_every": 3, "sample_every": 100, "first_sample": 0}


def tune(pictures: Path, out: Path, checkpoint: Path, steps: int = 6, **more: Any) -> Path:
    settings = {**SMALL, "variations": 2, **more}
    options = {"kept": 3, **settings.pop("options", {})}
    return fine_tune(pictures, out, str(checkpoint), steps=steps, device="cpu", progress=False, options=options, **settings)


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pictures_become_shards_and_the_rest_is_counted(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    prepared = prepare(pictures, tmp_path / "run", str(checkpoint), variations=2)
    assert (prepared.pairs, prepared.pictures) == (6, 3)
    assert prepared.left_out == {"no caption": 1, "unreadable picture": 1}
    assert prepared.new_words == ("zor", "bim")
    assert prepared.warnings() == [
        "3 of 5 pictures are used, the others are left out: 1 no caption, 1 unreadable picture",
        "words that are new to the model, and enter the vocabulary of the result: zor, bim",
    ]
    shards = LatentShards(prepared.latents)
    assert shards.captions() == [("zor",)] * 2 + [("red cat, noto",)] * 2 + [("a zor with bim",)] * 2
    same, changed = (row["mean"] for row in shards.read(torch.tensor([0, 1])))
    assert same.shape == changed.shape
    assert not torch.equal(same, changed)


def test_encoding_is_repeated_only_for_what_changed(
    pictures: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tune_data, "PER_PART", 2)  # a and b, bare and broken, c
    first = prepare(pictures, tmp_path / "run", str(checkpoint), variations=1)
    times = {path.name: path.stat().st_mtime_ns for path in first.latents.glob("*.safetensors")}
    assert len(times) == 3
    (pictures / "c.txt").write_text("bim", encoding="utf-8")
    again = prepare(pictures, tmp_path / "run", str(checkpoint), variations=1)
    kept = {path.name for path in again.latents.glob("*.safetensors") if path.stat().st_mtime_ns == times[path.name]}
    assert kept == {"00000.safetensors", "00001.safetensors"} or len(kept) == 2
    assert LatentShards(again.latents).captions()[-1] == ("bim",)


def test_a_run_learns_keeps_and_writes_a_whole_model(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    seconds: list[float] = []
    path = tune(pictures, tmp_path / "run", checkpoint, steps=30, estimate=seconds.append)
    assert len(seconds) == 1
    assert seconds[0] > 0
    rows = losses(tmp_path / "run")
    assert rows[0]["prior_noise"] < 1e-9  # before the first step nothing has moved
    first, last = (sum(row["caption"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < first - 0.2
    old, new = unidiffuser.load(checkpoint), unidiffuser.load(path)
    assert new.checkpoint.parts() == old.checkpoint.parts()
    assert new.config == replace(old.config, vocabulary=new.config.vocabulary)
    assert new.vocabulary == Vocabulary(("red cat", "cat", "zor"), ("noto",), ("bim",))
    for part in old.checkpoint.parts():
        before, after = old.checkpoint.state_dict(part), new.checkpoint.state_dict(part)
        assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in after.items()}
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert (part in ("uvit", "caption")) == bool(moved), part
        assert part != "caption" or all(name.startswith("gpt.transformer.h.") for name in moved)
    assert new.text_to_image("zor", steps=2)[0].size == (128, 128)
    assert isinstance(new.image_to_text(pictures / "a.png", steps=2)[0], str)


def test_a_network_that_predicts_pictures_is_tuned(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    write_tiny_checkpoint(path, downscale=4, uvit=HEAD | {"detail_inner": 8, "detail_inner_blocks": 1, "detail_told": 8})
    tuned = unidiffuser.load(tune(pictures, tmp_path / "run", path, steps=2, options={"captions": False}))
    assert tuned.vocabulary is None
    assert set(losses(tmp_path / "run")[0]) == {"step", "loss", "noise", "prior_noise"}
    assert tuned.text_to_image("zor", steps=2)[0].size == (128, 128)


def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    whole = tune(pictures, tmp_path / "whole", checkpoint)

    def stop(done: int, terms: dict[str, float], sample: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(pictures, tmp_path / "broken", checkpoint, watch=stop)
    assert not (tmp_path / "broken" / FILE).exists()
    broken = tune(pictures, tmp_path / "broken", checkpoint)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert broken.read_bytes() == whole.read_bytes()


def test_prior_samples_are_kept_for_the_same_model_and_settings(
    pictures: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(pictures, tmp_path / "run", checkpoint, steps=1)
    kept = (tmp_path / "run" / PRIOR).read_bytes()
    monkeypatch.setattr(prior_data, "sample_prior", lambda *_, **__: pytest.fail("sampled again"))
    tune(pictures, tmp_path / "run", checkpoint, steps=2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another config"):
        tune(pictures, tmp_path / "run", checkpoint, steps=2, options={"kept": 4})
    assert (tmp_path / "run" / PRIOR).read_bytes() != kept
    (tmp_path / "run" / PRIOR).write_bytes(b"damaged")
    tune(pictures, tmp_path / "run", checkpoint, steps=2)
    assert (tmp_path / "run" / PRIOR).read_bytes() == kept


def test_other_captions_are_another_run(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    tune(pictures, tmp_path / "run", checkpoint, steps=3)
    (pictures / "a.txt").write_text("bim", encoding="utf-8")
    with pytest.raises(ValueError, match="another config"):
        tune(pictures, tmp_path / "run", checkpoint, steps=3)


def test_another_size_makes_a_model_of_that_size(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    prepared = prepare(pictures, tmp_path / "run", str(checkpoint), image_size=64, variations=1)
    assert "the result draws 64 x 64 pixels, the model was trained at 128" in prepared.warnings()[1]
    made = unidiffuser.load(tune(pictures, tmp_path / "run", checkpoint, steps=2, image_size=64, variations=1))
    assert made.config.image_size == 64
    assert made.text_to_image("zor", steps=2)[0].size == (64, 64)
    with pytest.raises(ValueError, match="image_size must be a multiple of 32, got 65"):
        prepare(pictures, tmp_path / "other", str(checkpoint), image_size=65)


def test_the_sample_grid_has_new_pairs_and_what_was_known(pictures: Path, tmp_path: Path, checkpoint: Path) -> None:
    prepared = prepare(pictures, tmp_path / "run", str(checkpoint), variations=2)
    options = {"latents": str(prepared.latents), "checkpoint": str(checkpoint), "kept": 3}
    config = fine_tune_config(tmp_path / "run", steps=2, batch_size=2, options=options)
    stage = fine_tune_stage(config)
    assert isinstance(stage, FineTuneStage)
    assert stage.shown().captions == ["zor", "red cat, noto", "a zor with bim", "zor", "red cat, noto", "a zor with bim"]
    seen: list[tuple[int, Any]] = []
    train(stage, config, progress=False, device="cpu", watch=lambda done, _, picture: seen.append((done, picture)))
    assert [done for done, picture in seen if picture is not None] == [1, 2]
    width, height = seen[-1][1].size
    assert width == 6 * 132 + 4
    assert height >= 3 * 132


def test_what_cannot_be_used_is_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare(tmp_path / "gone", tmp_path / "run", str(checkpoint))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        prepare(empty, tmp_path / "run", str(checkpoint))
    Image.new("RGB", (9, 9)).save(empty / "a.png")
    with pytest.raises(ValueError, match=r"holds 1 pictures and no caption: write one in cat\.txt beside cat\.png"):
        prepare(empty, tmp_path / "run", str(checkpoint))
    (empty / "a.png").write_text("no picture")
    (empty / "a.txt").write_text("zor", encoding="utf-8")
    with pytest.raises(ValueError, match="can be used: 1 unreadable picture"):
        prepare(empty, tmp_path / "run", str(checkpoint))
    Image.new("RGB", (9, 9)).save(empty / "a.png")
    with pytest.raises(ValueError, match="unknown options colour"):
        tune(empty, tmp_path / "other", checkpoint, options={"colour": 1})
    with pytest.raises(ValueError, match="variations must be at least 1"):
        prepare(empty, tmp_path / "run", str(checkpoint), variations=0)


def test_listed_captions_are_read(tmp_path: Path, checkpoint: Path) -> None:
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a.png")
    lines = [json.dumps({"file_name": "a.png", "text": ["zor", "bim"]}), "no record"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepared = prepare(tmp_path, tmp_path / "run", str(checkpoint), variations=1)
    assert prepared.left_out == {"bad line in metadata.jsonl": 1}
    assert LatentShards(prepared.latents).captions() == [("zor", "bim")]


def test_the_command(pictures: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "LONG", 0)
    line = ["fine-tune", str(pictures), "--model", str(checkpoint), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*line, "--steps", "2", "--batch-size", "2", "--kept", "2", "--variations", "1"])
    assert done.exit_code == 0, done.output
    for said in (
        "3 of 5 pictures are used",
        "words that are new to the model, and enter the vocabulary of the result: zor, bim",
        "training takes about",
        "0000001.png",
        f"wrote {tmp_path / 'run' / FILE}",
    ):
        assert said in done.stderr
    info = CliRunner().invoke(app, ["info", str(tmp_path / "run" / FILE)])
    assert "zor" in info.output
    quiet = CliRunner().invoke(app, [*line, "--steps", "2", "--batch-size", "2", "--kept", "2", "--variations", "1", "-q"])
    assert quiet.exit_code == 0
    assert "training takes" not in quiet.stderr


WORDS = st.sampled_from(["red", "blue", "apple", "zorbi", "hat", "and", "noto", "红"])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=4).map(", ".join))
def test_new_words_of_captions_are_known_afterwards(caption: str) -> None:
    vocabulary = Vocabulary(("red apple", "blue house"), ("noto",))
    new = {found.text for found in unknown_words(caption, vocabulary) if " " not in found.text}
    known = with_captions(vocabulary, [caption])
    assert not new & {found.text for found in unknown_words(caption, known)}
    assert known.concepts[:2] == vocabulary.concepts
    assert len(set(known.concepts) | set(known.words)) == len(known.concepts) + len(known.words)


def test_a_pair_is_varied_the_same_way_each_time(tmp_path: Path) -> None:
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "a.png")
    pairs = [Pair("a.png", ("zor",), tmp_path / "a.png")]
    (part,) = fine_tune_data.captioned_parts(pairs, 32, 3, 0)
    made = [pair.image().tobytes() for pair in part.read()]
    assert len(set(made)) == 3
    assert [pair.image().tobytes() for pair in part.read()] == made
