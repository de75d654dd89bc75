"""The judge: that it learns real pictures, that its file judges alike, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from evaluation_pictures import SIDE, STYLES, labelled_folder

from unidiffuser.data.captioned import Pair
from unidiffuser.emoji.judge import BUNDLED, Judge, load_judge
from unidiffuser.emoji.judge_training import augment, train_judge
from unidiffuser.evaluation.digests import file_digest
from unidiffuser.evaluation.sources import in_split, read_source


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return read_source({"format": "folder", "path": str(labelled_folder(tmp_path_factory.mktemp("pictures")))})


def test_the_judge_learns_real_pictures_and_its_file_judges_alike(pairs: list[Pair], tmp_path: Path) -> None:
    judge = train_judge(pairs, concept_steps=40, style_steps=40, concept_batch=24, style_batch=8, progress=False)
    train = in_split(pairs, "train")
    right = [v.label == p.label for v, p in zip(judge.classify([p.image() for p in train]), train, strict=True)]
    assert sum(right) / len(right) > 0.8  # chance is 1 / 12

    judge.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    images = torch.rand(4, 3, 100, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for ours, theirs in zip(judge.eval()(images), again(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
    assert [p.name for p in tmp_path.iterdir()] == ["judge.safetensors"]
    assert again.digest() == load_judge(tmp_path / "judge.safetensors").digest() != judge.digest()


def test_training_is_repeatable_and_leaves_the_global_generator_alone(pairs: list[Pair]) -> None:
    state = torch.get_rng_state()
    one, two = (
        train_judge(pairs, concept_steps=2, style_steps=2, concept_batch=4, style_batch=4, seed=5, progress=False)
        for _ in range(2)
    )
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_one_half_goes_on_alone(pairs: list[Pair]) -> None:
    start = train_judge(pairs, concept_steps=1, style_steps=1, concept_batch=4, style_batch=4, progress=False)
    before = copy.deepcopy(start.state_dict())
    longer = train_judge(pairs, concept_steps=0, style_steps=2, style_batch=4, start=start, progress=False)
    torch.testing.assert_close(start.state_dict(), before, rtol=0, atol=0)
    moved = {name for name, value in longer.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("strokes", "style_head")) for name in moved)
    fewer = start.among({"thing, 3", "thing, 7"})
    with pytest.raises(ValueError, match="other concepts"):
        train_judge(pairs, concept_steps=0, style_steps=1, start=fewer, progress=False)


def test_held_out_pictures_are_never_opened(pairs: list[Pair]) -> None:
    shut = [p if p.split == "train" else Pair(p.key, p.captions, Path("nowhere"), fields=p.fields) for p in pairs]
    train_judge(shut, concept_steps=1, style_steps=1, concept_batch=4, style_batch=4, progress=False)


def test_a_judge_among_fewer_concepts_gives_the_same_scores_to_those(pairs: list[Pair]) -> None:
    judge = train_judge(pairs, concept_steps=2, style_steps=2, concept_batch=4, style_batch=4, progress=False)
    few = judge.among({"thing, 3", "thing, 7", "unknown"})
    assert set(few.labels) == {"thing, 3", "thing, 7"}
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [judge.labels.index(label) for label in few.labels]
    torch.testing.assert_close(few(images)[0], judge(images)[0][:, rows])
    torch.testing.assert_close(few(images)[1], judge(images)[1])
    with pytest.raises(ValueError, match="knows none"):
        judge.among({"unknown"})


def test_augmented_pictures_stay_pictures_and_no_change_is_no_change() -> None:
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = augment(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert changed.abs().max() <= 1
    assert (changed - images).abs().mean() > 0.05
    white = torch.ones(4, 3, SIDE, SIDE)
    assert augment(white, torch.Generator().manual_seed(1), colour=0.0).min() > 0.5  # nothing black comes in from outside


def test_files_that_are_no_judge_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train a judge"):
        load_judge(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a judge at all")
    with pytest.raises(ValueError, match="damaged"):
        load_judge(tmp_path / "bad.safetensors")


def test_the_bundled_judge_is_small_and_knows_the_bundled_concepts() -> None:
    from unidiffuser.emoji.prepare import CONCEPTS_FILE

    judge: Judge = load_judge()
    labels = [line.split(maxsplit=1)[1] for line in CONCEPTS_FILE.read_text("utf-8").splitlines() if line[:1] not in "#"]
    assert set(labels) <= set(judge.labels)
    assert set(judge.styles) == set(STYLES)
    assert BUNDLED.stat().st_size <= 3_000_000
    assert len(file_digest(BUNDLED)) == 64
    plain = judge.among(labels).judge(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 128, 128))[0]
    assert plain.label in labels
    assert plain.style in STYLES
