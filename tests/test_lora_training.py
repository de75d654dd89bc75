"""LoRA training: the training pairs, prior preservation, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import HEAD, write_tiny_checkpoint
from torch import Tensor
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.cli import app
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.runtime.lora import layers_of, read_lora
from unidiffuser.small.network import predicts_noise
from unidiffuser.streams import Streams
from unidiffuser.training import lora_data, lora_run
from unidiffuser.training.adapters import AdaptedModel
from unidiffuser.training.curve import draw_curve
from unidiffuser.training.loop import train
from unidiffuser.training.lora_stage import LoRAStage
from unidiffuser.training.network import trainable_network
from unidiffuser.training.objective import diffusion_loss
from unidiffuser.training.prior_data import decode_tokens
from unidiffuser.training.stages import make_stage

RED, GREEN = (200, 40, 30), (30, 180, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint_with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its network predicts pictures rather than noise and has convolutions."""
    path = tmp_path_factory.mktemp("tiny") / "head.safetensors"
    write_tiny_checkpoint(path, downscale=4, uvit=HEAD | {"detail_inner": 8, "detail_inner_blocks": 1, "detail_told": 8})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (90, 70), RED).save(folder / "a.png")
    Image.new("RGB", (128, 128), GREEN).save(folder / "b.jpg")
    (folder / "b.txt").write_text("zor cat\n", encoding="utf-8")
    (folder / "notes.md").write_text("no picture", encoding="utf-8")
    return folder


def config(out: Path, checkpoint: Path, pictures: Path, steps: int = 6, **options: Any) -> Any:
    chosen = {"data": str(pictures), "word": "zor", "checkpoint": str(checkpoint), "kept": 3, "variations": 2, "rank": 2}
    return lora_run.lora_config(
        out, steps=steps, batch_size=4, learning_rate=0.02, save_every=3, sample_every=100, options={**chosen, **options}
    )


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pictures_and_their_captions(pictures: Path, tmp_path: Path) -> None:
    found, captions = lora_data.read_pictures(pictures, 64, "zor")
    assert [picture.size for picture in found] == [(64, 64), (64, 64)]
    assert captions == [["zor"], ["zor cat"]]
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        lora_data.read_pictures(pictures, 64)
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        lora_data.read_pictures(tmp_path, 64, "zor")
    with pytest.raises(FileNotFoundError, match="no folder"):
        lora_data.read_pictures(tmp_path / "nowhere", 64, "zor")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"broken\.png"):
        lora_data.read_pictures(tmp_path, 64, "zor")


def test_several_captions_of_a_picture_take_turns(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png")
    record = {"file_name": "a.png", "text": ["zor", "zor, noto"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(record), encoding="utf-8")
    found, captions = lora_data.read_pictures(tmp_path, 8)
    assert found[0].size == (8, 8)
    assert lora_data.captions_of_variations(captions, 3) == ("zor", "zor, noto", "zor")


def test_variations_begin_with_the_picture_itself(pictures: Path) -> None:
    found, _ = lora_data.read_pictures(pictures, 32, "zor")
    made = lora_data.variations(found, 3, 0.5, seed=0)
    assert len(made) == 6
    assert made[0].tobytes() == found[0].tobytes()
    assert made[3].tobytes() == found[1].tobytes()
    assert len({picture.tobytes() for picture in made}) == 6
    assert lora_data.variations(found, 1, 0.5, seed=0)[1].tobytes() == found[1].tobytes()


def asked(stage: LoRAStage, model: AdaptedModel) -> float:
    """Error in what is to be learned, on the same noise for every model."""
    batch = stage.examples(torch.arange(stage.size).repeat(16), list(range(16 * stage.size)))
    with torch.no_grad():
        return stage.loss(model, batch, torch.Generator())["noise"].item()


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_with_head"])
def test_a_run_learns_keeps_and_writes_what_it_learned(
    kind: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(kind)
    run = config(tmp_path, checkpoint, pictures, steps=40)
    stage = make_stage(run)
    assert isinstance(stage, LoRAStage)
    seen: list[tuple[int, dict[str, float]]] = []
    model = train(stage, run, progress=False, device="cpu", watch=lambda done, terms, _: seen.append((done, terms)))
    assert isinstance(model, AdaptedModel)
    rows = losses(tmp_path)
    first, last = ({k: sum(r[k] for r in part) / len(part) for k in rows[0]} for part in (rows[:5], rows[-5:]))
    assert rows[0]["prior_noise"] < 1e-9  # before the first step nothing has moved
    assert asked(stage, stage.model) < asked(stage, make_stage(run).model)
    assert last["caption"] < first["caption"] - 0.2
    assert [done for done, _ in seen] == list(range(1, 41))
    assert (tmp_path / "losses.png").is_file()
    assert list((tmp_path / "samples").iterdir())

    plain = unidiffuser.load(checkpoint, dtype=torch.float32)
    taught = unidiffuser.load(checkpoint, dtype=torch.float32, lora=[(tmp_path / lora_run.FILE, 1.0)])
    generator = torch.Generator().manual_seed(0)
    item = [torch.randn(2, *shape, generator=generator) for shape in plain.config.uvit.item_shapes.values()]
    with torch.no_grad():
        for mine, theirs in zip(model.network(*item, 300.0, 700.0), taught.net(*item, 300.0, 700.0), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
        with model.disabled():
            before = model.network(*item, 300.0, 700.0)
        for mine, theirs in zip(before, plain.net(*item, 300.0, 700.0), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        assert model.captioner is not None
        torch.testing.assert_close(model.captioner(item[2], tokens), taught.captioner(item[2], tokens), atol=1e-4, rtol=1e-3)
    weights = plain.checkpoint.state_dict("uvit")
    layers = {name.removesuffix(".weight") for name, w in weights.items() if name.endswith(".weight") and w.ndim > 1}
    lora = read_lora(
        tmp_path / lora_run.FILE, {part: layers_of(plain.checkpoint.state_dict(part)) for part in ("uvit", "caption")}
    )
    assert set(lora.changes["uvit"]) == layers - {"token_embedding"}  # every matrix and convolution
    taught.unload_lora()
    assert all(torch.equal(a, b) for a, b in zip(plain.net.parameters(), taught.net.parameters(), strict=True))


def test_a_broken_run_goes_on_with_the_losses_of_an_unbroken_one(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    whole = config(tmp_path / "whole", checkpoint, pictures)
    train(make_stage(whole), whole, progress=False, device="cpu")
    broken = config(tmp_path / "broken", checkpoint, pictures)

    def stop(done: int, terms: dict[str, float], sample: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_stage(broken), broken, progress=False, device="cpu", watch=stop)
    assert not (tmp_path / "broken" / lora_run.FILE).exists()
    train(make_stage(broken), broken, progress=False, device="cpu")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert (tmp_path / "broken" / lora_run.FILE).read_bytes() == (tmp_path / "whole" / lora_run.FILE).read_bytes()


def test_the_command(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    line = ["train-lora", str(pictures), "--word", "zor", "--model", str(checkpoint), "--out", str(tmp_path / "run")]
    short = ["--steps", "2", "--batch-size", "2", "--kept", "2", "--variations", "1", "--rank", "2"]
    done = CliRunner().invoke(app, [*line, *short])
    assert done.exit_code == 0, done.output
    file = tmp_path / "run" / lora_run.FILE
    assert f"wrote {file}" in done.stderr
    model = unidiffuser.load(checkpoint, device="cpu")
    before = model.net.get_parameter("mid_block.attn.qkv.weight").clone()
    model.load_lora(file)
    assert not torch.equal(model.net.get_parameter("mid_block.attn.qkv.weight"), before)
    drawn = [
        "text-to-image",
        "zor",
        "--model",
        str(checkpoint),
        "--lora",
        str(file),
        "--steps",
        "1",
        "--device",
        "cpu",
        "-n",
        "1",
    ]
    done = CliRunner().invoke(app, [*drawn, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output


def test_another_word_is_another_run(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    first = config(tmp_path, checkpoint, pictures, steps=3)
    train(make_stage(first), first, progress=False, device="cpu")
    other = config(tmp_path, checkpoint, pictures, steps=3, word="plim")
    with pytest.raises(ValueError, match="another config"):
        train(make_stage(other), other, progress=False, device="cpu")


def test_without_captions_the_decoder_is_left_alone(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    run = config(tmp_path, checkpoint, pictures, steps=1, captions=False)
    train(make_stage(run), run, progress=False, device="cpu")
    assert set(losses(tmp_path)[0]) == {"step", "loss", "noise", "prior_noise"}
    model = unidiffuser.load(checkpoint, dtype=torch.float32, lora=[(tmp_path / lora_run.FILE, 1.0)])
    decoder = unidiffuser.load(checkpoint, dtype=torch.float32).captioner
    assert all(torch.equal(a, b) for a, b in zip(model.captioner.parameters(), decoder.parameters(), strict=True))


def stage_of(checkpoint: Path, streams: Streams, words: tuple[str, ...]) -> LoRAStage:
    opened = load_checkpoint(checkpoint)
    network = trainable_network(opened.config.uvit, opened.state_dict("uvit", dtype=torch.float32))
    captioner = CaptionDecoder.from_checkpoint(opened, dtype=torch.float32)
    prior_tokens = decode_tokens(captioner, streams.need("text"))
    return LoRAStage(AdaptedModel(network, captioner, 2, 0), lora_data.LoRAData(streams, words, streams, prior_tokens), Path())


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = load_checkpoint(checkpoint).config.uvit.item_shapes
    streams = Streams(**{name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()})
    stage = stage_of(checkpoint, streams, ("a", "b", "a", "b"))  # of one length, so that every example weighs the same

    def terms(rows: list[int]) -> dict[str, Tensor]:
        batch = stage.examples(torch.tensor(rows), [100 + row for row in rows])
        return stage.loss(stage.model, batch, torch.Generator())

    whole, parts = terms([0, 1, 2, 3]), [terms([0, 1]), terms([2, 3])]
    for name in ("noise", "prior_noise", "caption"):
        torch.testing.assert_close(whole[name], (parts[0][name] + parts[1][name]) / 2)


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_with_head"])
def test_what_is_learned_counts_as_in_the_objective_that_made_the_network(kind: str, request: pytest.FixtureRequest) -> None:
    opened = load_checkpoint(request.getfixturevalue(kind))
    generator = torch.Generator().manual_seed(0)
    streams = Streams(**{n: torch.randn(1, *shape, generator=generator) for n, shape in opened.config.uvit.item_shapes.items()})
    stage = stage_of(opened.path, streams, ("a",))
    batch = stage.examples(torch.tensor([0]), [3])
    learned = {name: value[:, 0] for name, value in batch.items()}
    labels = {"img": learned["t_img"], "text": learned["t_text"]}
    noise = Streams(**{name: learned[f"noise_{name}"] for name, _ in streams.items()})
    velocity = not predicts_noise(opened.config.uvit)
    wanted = diffusion_loss(stage.model.network, streams, generator, labels=labels, noise=noise, velocity=velocity)
    torch.testing.assert_close(stage.loss(stage.model, batch, generator)["noise"], wanted["loss"].detach())


def test_settings_out_of_range_are_told(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora_run.LoRASettings(rank=0)
    with pytest.raises(ValueError, match="keep must not be negative"):
        lora_run.LoRASettings(keep=-1.0)
    for options, words in (({"keep": "much"}, "keep must be a number"), ({"word": 5}, "word must be a text")):
        with pytest.raises(ValueError, match=words):
            lora_run.lora_stage(lora_run.lora_config(tmp_path, options={"data": str(tmp_path), **options}))
    with pytest.raises(ValueError, match="unknown options colour"):
        make_stage(config(tmp_path, checkpoint, pictures, colour=1))


def test_a_curve_shows_every_term_and_survives_zeros() -> None:
    rows = [{"step": k, "loss": 1 / (k + 1), "keep": 0.0} for k in range(500)]
    picture = draw_curve(rows, 400, 300)
    assert picture.size == (400, 300)
    assert len(picture.getcolors(1 << 20)) > 10
    assert draw_curve(rows[:1]).size == (768, 432)
    with pytest.raises(ValueError, match="at least one step"):
        draw_curve([])
