"""What of a prompt a model cannot follow: unknown words with the nearest known ones, and what is cut."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import write_tiny_checkpoint

import unidiffuser
from unidiffuser.checkpoints.tokenizers import BytePairTokenizer, clip_spec
from unidiffuser.checkpoints.vocabulary import Vocabulary
from unidiffuser.emoji.words import emoji_vocabulary
from unidiffuser.encoders.prompts import check_prompt, unknown_words, warning_about
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.runtime.lora import Change, write_lora

EMOJI = emoji_vocabulary()
ASTRONAUT = "\U0001f469\u200d\U0001f680"
CLIP = BytePairTokenizer.from_spec(clip_spec())


@pytest.fixture(scope="module")
def model() -> UniDiffuser:
    return unidiffuser.load("emoji", device="cpu")


@pytest.mark.parametrize(
    "prompt",
    ["", " , . ", "red apple", "Red Apple, TWEMOJI!", "red apple twemoji", "a red apple and the black cat in the castle",
     "apple", "T-Rex; jack-o-lantern", "star-struck\nflat", "HOT  DOG"],
)  # fmt: skip
def test_known_words_are_not_reported(prompt: str) -> None:
    assert unknown_words(prompt, EMOJI) == []


@pytest.mark.parametrize("name", [*EMOJI.concepts, *EMOJI.styles])
def test_every_concept_and_style_is_known(name: str) -> None:
    assert unknown_words(name, EMOJI) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("castle in the mountains", {"mountains": ["volcano"]}),  # a synonym's plural
        ("red aple, twmoji", {"aple": ["red apple", "green apple", "maple leaf"], "twmoji": ["twemoji"]}),  # spelling
        ("two lions", {"two": [], "lions": ["lion"]}),  # plural
        ("lion's", {"lion's": ["lion"]}),
        ("cherry", {}),  # a word of "cherry blossom"
        ("burger", {"burger": ["hamburger"]}),
        ("ice creme", {"creme": ["ice cream"]}),
        ("blue apple", {"blue apple": ["red apple", "green apple", "blue heart"]}),  # known words, never together
        ("blue, apple", {}),
        ("红苹果，猫", {"红苹果": [], "猫": []}),
        ("\U0001f34e\U0001f408", {"\U0001f34e": ["red apple"], "\U0001f408": ["cat"]}),
        ("\u2764\ufe0f!", {"\u2764": ["red heart"]}),
        (f"an {ASTRONAUT}", {ASTRONAUT: []}),  # joined characters are one word
        ("table, table", {"table": []}),
        ("“table”", {"table": []}),
    ],
)
def test_unknown_words_and_the_nearest_known_ones(prompt: str, expected: dict[str, Sequence[str]]) -> None:
    assert {found.text: list(found.nearest) for found in unknown_words(prompt, EMOJI)} == expected


def test_a_symbol_is_named_by_unicode() -> None:
    vocabulary = Vocabulary(("red apple", "pear"))
    assert [found.nearest for found in unknown_words("\U0001f34e \U0001f350 \U0001f680", vocabulary)] == [
        ("red apple",),
        ("pear",),
        (),
    ]


def test_words_of_training_captions_are_known_alone() -> None:
    vocabulary = Vocabulary(("red apple", "blue heart"), words=("blue", "apple", "table"))
    assert unknown_words("blue apple on a table", vocabulary) == []


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_checked(text: str) -> None:
    for found in unknown_words(text, EMOJI):
        assert found.text
        assert set(found.nearest) <= {*EMOJI.concepts, *EMOJI.styles}
        assert len(found.nearest) <= 3
    assert unknown_words(text, EMOJI) == unknown_words(text, EMOJI)


def test_a_long_prompt_is_checked_quickly() -> None:
    started = time.monotonic()
    check = check_prompt("xylophone zeppelin " * 5000, EMOJI, CLIP, 77)
    assert time.monotonic() - started < 2
    assert [found.text for found in check.unknown] == ["xylophone", "zeppelin"]
    assert len(str(check)) < 300


def test_what_is_cut() -> None:
    prompt = "red apple " * 37 + "on TABLES in Paris"
    check = check_prompt(prompt, None, CLIP, 77)
    assert check.lost == "TABLES in Paris"
    assert str(check) == 'cut to the text encoder\'s limit of 75 tokens, which loses "TABLES in Paris"'
    assert not check_prompt("red apple", None, CLIP, 77)
    assert check_prompt(prompt, EMOJI, CLIP, 77).unknown == ()  # only what is read can be unknown


def test_a_word_that_is_cut_inside_is_not_reported_as_unknown() -> None:
    check = check_prompt("lion zzzzzzzzzzzzzzzzzzzz", EMOJI, CLIP, 6)
    assert check.lost
    assert check.unknown == ()


def test_one_line_for_many_prompts() -> None:
    prompts = ["lion", *(f"table {number}" for number in range(10))]
    line = warning_about(prompts, [check_prompt(prompt, EMOJI, CLIP, 77) for prompt in prompts])
    assert line.startswith('prompt "table 0": the model does not know "table" and "0"; prompt "table 1"')
    assert line.endswith("and 7 more prompts")
    assert warning_about(["lion"], [check_prompt("lion", EMOJI, CLIP, 77)]) == ""


def test_the_bundled_model_lists_its_words(model: UniDiffuser) -> None:
    assert model.vocabulary == EMOJI
    assert len(EMOJI.concepts) == 240
    assert {name for names in EMOJI.synonyms.values() for name in names} <= set(EMOJI.concepts)


def of_prompts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of prompts: a random or hardly sampled latent may get one of its own."""
    return [text for record in caplog.records if "range of pictures" not in (text := record.getMessage())]


def test_each_task_warns_once(model: UniDiffuser, caplog: pytest.LogCaptureFixture) -> None:
    quick = {"steps": 1}
    tasks = {
        "text_to_image": lambda prompt: model.text_to_image([prompt, "lion"], negative="zeppelin", **quick),
        "vary_text": lambda prompt: model.vary_text(prompt, **quick),
        "gibbs": lambda prompt: model.gibbs(prompt, rounds=1, **quick),
    }
    for task, run in tasks.items():
        for prompt, warnings in (("castle, noto", int(task == "text_to_image")), ("castle in the mountains", 1)):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "unidiffuser"):
                run(prompt)
            assert len(of_prompts(caplog)) == warnings, (task, prompt)
            assert ('"mountains" (nearest: volcano)' in caplog.text) == ("mountains" in prompt)
            assert ('"zeppelin"' in caplog.text) == (task == "text_to_image")


def test_a_checkpoint_without_a_vocabulary_reports_only_what_is_cut(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu")
    with caplog.at_level(logging.WARNING):
        model.text_to_image("qwerty", steps=1)
    assert model.vocabulary is None
    assert of_prompts(caplog) == []


def test_captions_to_rewrite_and_to_score_are_checked(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu")
    model.config = replace(model.config, vocabulary=Vocabulary(("cat",)))
    picture = Image.new("RGB", (32, 32))
    with caplog.at_level(logging.WARNING):
        model.rewrite("cat zo", picture, change="cat", steps=1)
        model.score(picture, ["cat", "xy"], shuffled=["ij"], levels=1)
    first, second = of_prompts(caplog)
    assert 'prompt "cat zo": the model does not know "zo"' in first
    assert '"xy"' in second
    assert '"ij"' in second


def test_words_of_loras_are_known(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny_checkpoint(path)
    lora, foreign = tmp_path / "zorbi.safetensors", tmp_path / "foreign.safetensors"
    change = {"uvit": {"in_blocks.0.attn.qkv": Change(torch.zeros(2, 48), torch.zeros(144, 2))}}
    write_lora(lora, change, {"words": ["a zo, flat"]})
    write_lora(foreign, change, {})
    model = unidiffuser.load(path, device="cpu")
    model.config = replace(model.config, vocabulary=Vocabulary(("cat",)))

    def unknown() -> list[str]:
        return [found.text for found in model.check_prompts(["zo x"])[0].unknown]

    assert unknown() == ["zo", "x"]
    model.load_lora(lora)
    assert unknown() == ["x"]
    model.load_lora(foreign, 0)
    assert unknown() == ["x"]
    model.load_lora(foreign)  # what it knows cannot be told
    assert unknown() == []
    model.unload_lora()
    assert unknown() == ["zo", "x"]
