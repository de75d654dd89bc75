"""`unidiffuser evaluate` on a toy checkpoint: a real kill, a restart, the files; and the extractors that a user may name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_pictures import draw
from PIL import Image
from typer.testing import CliRunner

from unidiffuser.cli import app
from unidiffuser.emoji.__main__ import app as emoji_app
from unidiffuser.evaluation.clip_score import Clip
from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.evaluation.features import InceptionFeatures
from unidiffuser.evaluation.inception import Inception
from unidiffuser.evaluation.loading import load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Eight pictures with a caption each, asked in all directions with two steps."""
    for k in range(8):
        draw(k, k % 4).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"thing number {k}\nanother thing {k}\n")
    source = f"{{format: folder, path: {tmp_path}}}"
    lines = [
        f"model: {tiny_checkpoint}",
        f"data: {source}",
        f"training: {source}",
        "steps: 2",
        "batch: 2",
        "pairs: 4",
        "device: cpu",
        "guidance_sweep: {values: [1, 3], split: all, limit: 4}",
        "retrieval: {split: all, count: 4, levels: 1}",
        "diversity: {split: all, captions: 2, count: 2}",
    ]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    return tmp_path / "config.yaml"


def scores(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "scores.json").read_text())
    return {key: value for key, value in report.items() if key != "timing"}


def test_a_killed_process_resumes_to_the_same_numbers(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unidiffuser", "evaluate", str(config), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "cut").rglob("text_to_image-*/00000002.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "scores.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("0*.safetensors")}

    for name in ("cut", "whole"):
        done = CliRunner().invoke(app, ["evaluate", str(config), "--out", str(tmp_path / name), "--quiet"])
        assert done.exit_code == 0, done.output
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was there is made again
    assert (tmp_path / "cut" / "scores.md").read_text() == (tmp_path / "whole" / "scores.md").read_text()
    names = {(row["task"], row["measure"]) for row in scores(tmp_path / "cut")["measures"]}
    assert {
        ("text_to_image", "FID"),
        ("text_to_image", "nearer than real"),
        ("image_to_text", "CIDEr-D"),
        ("image", "KID"),
    } <= names
    page = (tmp_path / "cut" / "report.html").read_text()
    assert page.count("<img") == 6  # the curves and five grids


def test_mistakes_end_as_one_line(config: Path, tmp_path: Path) -> None:
    for change, message in [
        ("features=none.pth", "pt_inception-2015-12-05-6726825d.pth"),
        ("clip=none", "clip-vit-large-patch14"),
        ("judge=bundled", "python -m unidiffuser.emoji evaluate"),
        ("splits=[test]", "this source has: all"),
        ("dtype=float99", "float16"),
        ("speed=1", "unknown settings speed"),
    ]:
        done = CliRunner().invoke(app, ["evaluate", str(config), "--out", str(tmp_path / "x"), "--set", change])
        assert done.exit_code == 2, change
        assert message in done.output
        assert done.output.count("\n") == 1


def test_the_bundled_models_command_takes_a_judge(config: Path, tmp_path: Path) -> None:
    for change, message in [
        ("judge=none.safetensors", "train a judge"),
        ("judge=bundled", "knows none of these labels"),
        ("speed=1", "unknown settings speed"),
    ]:
        done = CliRunner().invoke(emoji_app, ["evaluate", str(config), "--out", str(tmp_path / "x"), "--set", change])
        assert done.exit_code == 2, change
        assert message in done.output
        assert done.output.count("\n") == 1


def test_a_sample_does_not_depend_on_its_batch(config: Path) -> None:
    model, _ = load_model(EvaluationConfig.from_file(config))
    sampler = model.sampler(steps=2)
    together = sampler.text_to_image(["thing", "other"], [5, 6])
    assert np.abs(np.asarray(together[1], int) - np.asarray(sampler.text_to_image(["other"], [6])[0], int)).max() <= 1
    assert sampler.text_to_image(["thing", "thing"], [5, 6])[0] != sampler.text_to_image(["thing", "thing"], [5, 6])[1]


# Extractors


def test_inception_takes_the_usual_file_and_nothing_else(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Inception()
    assert sum(p.numel() for p in net.parameters()) == 21_785_568  # 23,851,784 of pytorch-fid's without its classifier
    state = net.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "inception.pth")
    extractor = InceptionFeatures(tmp_path / "inception.pth", torch.device("cpu"))
    found = extractor([draw(0, 0), draw(1, 1)])
    assert found.shape == (2, 2048)
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 1e-3 * np.abs(found).max()  # without training all features are tiny
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for name in ("other.pth", "bad.pth"):
        with pytest.raises(ValueError, match="not pytorch-fid's Inception"):
            InceptionFeatures(tmp_path / name, torch.device("cpu"))


def write_clip(folder: Path) -> None:
    """A CLIP model of toy size, as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16}
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = small | {"vocab_size": len(tokens), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)
    normal = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal))


def test_a_clip_folder_gives_scores_and_retrieval(tmp_path: Path, config: Path) -> None:
    from transformers import CLIPModel

    write_clip(tmp_path / "clip")
    clip = Clip(tmp_path / "clip", torch.device("cpu"))
    images, texts = (
        clip.images([draw(0, 0), draw(5, 1)]),
        clip.texts(["cat", "a long text that has far more than twelve tokens"]),
    )
    small = [np.asarray(draw(*k).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255 for k in ((0, 0), (5, 1))]
    pixels = torch.from_numpy((np.stack(small) - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).permute(0, 3, 1, 2).float()
    ids = torch.tensor([[52, 2, 0, 26 + 19, 53]])  # start, c, a, t</w>, end
    with torch.inference_mode():
        whole = CLIPModel.from_pretrained(tmp_path / "clip")(input_ids=ids, pixel_values=pixels)
    assert images @ texts[:1].T == pytest.approx((whole.image_embeds @ whole.text_embeds.T).numpy(), abs=1e-5)
    assert np.linalg.norm(texts, axis=1) == pytest.approx([1.0, 1.0])

    changes = ["--set", f"clip={tmp_path / 'clip'}", "--set", "tasks=[text_to_image, image_to_text]"]
    done = CliRunner().invoke(app, ["evaluate", str(config), "--out", str(tmp_path / "out"), *changes])
    assert done.exit_code == 0, done.output
    report = scores(tmp_path / "out")
    measures = {(row["task"], row["measure"]) for row in report["measures"]}
    assert {
        ("text_to_image", "CLIP score"),
        ("image_to_text", "CLIP score"),
        ("text_to_image", "CLIP text to image R@1"),
    } <= measures
    assert "CLIP score" in report["sweeps"]["guidance"][0]
