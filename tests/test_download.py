"""The download of a published checkpoint, from a local stand-in for the Hugging Face Hub."""

from __future__ import annotations

import errno
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("huggingface_hub")

from hub_stand_in import HubStandIn, hub_stand_in
from layouts import CONFIG, write_diffusers, write_original

from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.checkpoints.download import RECORD, download
from unidiffuser.checkpoints.published import needed_files
from unidiffuser.cli import app
from unidiffuser.media.files import take_lock

UNET, DECODER = "unet/diffusion_pytorch_model.bin", "text_decoder/diffusion_pytorch_model.bin"
NEEDED = {
    "model_index.json",
    "unet/config.json", UNET, "vae/config.json", "vae/diffusion_pytorch_model.bin", "text_decoder/config.json", DECODER,
    "text_encoder/config.json", "text_encoder/pytorch_model.bin",
    "image_encoder/config.json", "image_encoder/pytorch_model.bin",
    "clip_tokenizer/vocab.json", "clip_tokenizer/merges.txt", "text_tokenizer/vocab.json", "text_tokenizer/merges.txt",
    "text_tokenizer/added_tokens.json", "clip_image_processor/preprocessor_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of thu-ml/unidiffuser-v1 in small: the diffusers folder, the original files, and what nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write_original(folder, clip=False)
    pipeline = write_diffusers(folder, safe_serialization=False)
    for sub in ("text_encoder", "image_encoder"):  # transformers 5 writes no .bin
        import torch

        part = folder / sub
        torch.save(getattr(pipeline, sub).state_dict(), part / "pytorch_model.bin")
        for path in part.glob("*.safetensors"):
            path.unlink()
    for sub, tokenizer in (("clip_tokenizer", pipeline.clip_tokenizer), ("text_tokenizer", pipeline.text_tokenizer)):
        write_slow_tokenizer(folder / sub, tokenizer)
    for name in (".gitattributes", "README.md", "unet/diffusion_pytorch_model.fp16.bin", "images/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    return folder


def write_slow_tokenizer(folder: Path, tokenizer: Any) -> None:
    """vocab.json, merges.txt and added_tokens.json, as transformers 4 wrote them."""
    import json

    from unidiffuser.checkpoints.tokenizers import read_spec

    spec = read_spec(folder)
    assert spec is not None
    shutil.rmtree(folder)
    folder.mkdir()
    added = {token: i for token, i in tokenizer.get_added_vocab().items() if token == "<|EOS|>"}
    (folder / "vocab.json").write_text(json.dumps({token: i for token, i in spec["vocab"].items() if token not in added}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *spec["merges"]]) + "\n", encoding="utf-8")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with hub_stand_in(repository, "thu-ml/unidiffuser-v1") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # what a break loses at most
        yield server


def fetch(folder: Path, **options: Any) -> Path:
    return download("v1", folder, accept_licence=True, progress=False, **options)


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_exactly_the_needed_files_and_loads(hub: HubStandIn, tmp_path: Path, repository: Path) -> None:
    lines: list[str] = []
    folder = fetch(tmp_path / "new" / "v1", report=lines.append)
    assert contents(folder) == NEEDED | {RECORD}
    assert "AGPL-3.0" in (folder / RECORD).read_text()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.parts() == ("uvit", "vae", "clip_text", "clip_image", "caption")
    assert checkpoint.config.uvit == CONFIG.uvit
    assert len(lines) == len(NEEDED)
    assert lines[-1].startswith(f"{len(NEEDED)} of {len(NEEDED)}: ")

    hub.requests.clear()
    assert fetch(folder) == folder
    assert hub.requests == []  # all there


def test_a_broken_transfer_is_continued_where_it_ended(hub: HubStandIn, tmp_path: Path, repository: Path) -> None:
    hub.cut[UNET] = [100_000, 150_000]
    folder = fetch(tmp_path / "v1")
    assert [header for name, header in hub.requests if name == UNET] == [None, "bytes=100000-", "bytes=250000-"]
    assert (folder / UNET).read_bytes() == (repository / UNET).read_bytes()


def test_the_next_run_continues_a_broken_one(
    hub: HubStandIn, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut[UNET] = [100_000, *[0] * 20]  # a part, then nothing more
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match=rf"cannot get {UNET} of thu-ml/unidiffuser-v1 at http.*the next run continues"):
        fetch(tmp_path / "v1")
    assert not (tmp_path / "v1" / UNET).exists()
    assert load_checkpoint(tmp_path / "v1").parts() == ()  # nothing that looks complete and is not

    hub.cut.clear()
    hub.requests.clear()
    (rest,) = (tmp_path / "v1").rglob("*.partial")
    with rest.open("rb") as other:
        assert take_lock(other)
        with pytest.raises(ValueError, match=f"{UNET} is being downloaded by another process; wait until that one ends"):
            fetch(tmp_path / "v1")
    assert rest.stat().st_size == 100_000
    fetch(tmp_path / "v1")
    assert hub.requests[0] == (UNET, "bytes=100000-")
    assert contents(tmp_path / "v1") == NEEDED | {RECORD}
    assert (tmp_path / "v1" / UNET).read_bytes() == (repository / UNET).read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-100], r"\d+ bytes, not the \d+ of the listing"),
        (lambda data: data + b"more", r"\d+ bytes, not the \d+ of the listing"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "another checksum than the listing"),
    ],
)
@pytest.mark.parametrize("name", [DECODER, "clip_tokenizer/merges.txt"])  # checked by SHA-256, and as a git blob
def test_wrong_sizes_and_checksums_are_refused(
    hub: HubStandIn, tmp_path: Path, repository: Path, name: str, change: Any, says: str
) -> None:
    hub.served[name] = change((repository / name).read_bytes())
    with pytest.raises(OSError, match=rf"{name} of .* has {says}, and was removed; run the command again") as caught:
        fetch(tmp_path / "v1")
    assert "\n" not in str(caught.value)
    assert not [found for found in contents(tmp_path / "v1") if found.startswith(name)]
    hub.served.clear()
    fetch(tmp_path / "v1")
    assert contents(tmp_path / "v1") == NEEDED | {RECORD}


def test_a_file_that_was_damaged_here_is_downloaded_again(hub: HubStandIn, tmp_path: Path, repository: Path) -> None:
    folder = fetch(tmp_path / "v1")
    hub.requests.clear()
    (folder / DECODER).write_bytes(b"\0" * (folder / DECODER).stat().st_size)
    fetch(folder)
    assert hub.requests == [(DECODER, None)]
    assert (folder / DECODER).read_bytes() == (repository / DECODER).read_bytes()


def test_a_missing_file_is_named(hub: HubStandIn, tmp_path: Path, repository: Path) -> None:
    hub.gone.add(UNET)
    with pytest.raises(FileNotFoundError, match=f"{UNET} is missing in thu-ml/unidiffuser-v1 at {hub.address}; try again"):
        fetch(tmp_path / "v1")
    with pytest.raises(FileNotFoundError, match=r"thu-ml/unidiffuser-v0 at .* does not exist or is not public"):
        download("v0", tmp_path / "v0", accept_licence=True)


def test_an_incomplete_repository_is_refused_before_the_download(
    hub: HubStandIn, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = [name for name in hub.files() if name not in (UNET, "vae/config.json", "text_tokenizer/merges.txt")]
    monkeypatch.setattr(hub, "files", lambda: lacking)
    with pytest.raises(FileNotFoundError) as caught:
        fetch(tmp_path / "v1")
    names = "unet/diffusion_pytorch_model.safetensors, vae/config.json, text_tokenizer/merges.txt"
    assert str(caught.value).endswith(f"is no complete diffusers folder: it lacks {names}.")
    assert hub.requests == []
    assert not (tmp_path / "v1").exists()


def test_without_a_network_or_a_hub_one_line_says_so(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refused = 503
    with pytest.raises(OSError, match=f"the list of files of thu-ml/unidiffuser-v1 at {hub.address}: the server answered 503"):
        fetch(tmp_path)
    hub.refused = 200  # an empty page, as of a hotel's network
    with pytest.raises(OSError, match="does not answer like the Hugging Face Hub"):
        fetch(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"at http://127.0.0.1:9: no connection, or it broke \(.*refused\)"):
        fetch(tmp_path)


def test_a_full_disk_is_named_before_and_during_the_download(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    with pytest.raises(OSError, match=r"MB are needed in .*, and 1.00 kB are free; make room") as caught:
        fetch(tmp_path / "v1")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "v1").exists()
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)

    def full(url: str, file: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match="the disk is full; make room and run the command again") as caught:
        fetch(tmp_path / "v1")
    assert caught.value.errno == errno.ENOSPC


def test_without_the_extra_the_message_has_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'pip install "unidiffuser\[download\]"'):
        fetch(tmp_path)


def test_foreign_files_are_never_replaced(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("of another pipeline")
    with pytest.raises(ValueError, match=r"model_index.json exists and is not thu-ml/unidiffuser-v1's; choose an empty folder"):
        fetch(tmp_path)
    assert contents(tmp_path) == {"model_index.json"}
    fetch(tmp_path / "v1")
    with pytest.raises(ValueError, match=r"is the folder of thu-ml/unidiffuser-v1; choose another one for "):
        download("v0", tmp_path / "v1", accept_licence=True)


def run(*args: str, **options: Any) -> Result:
    return CliRunner().invoke(app, ["download", *args], **options)


def test_the_command_shows_the_licence_and_asks_once(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "v1")
    refused = run("v1", "--out", folder)  # stdin is no terminal here
    assert refused.exit_code == 2
    assert "published under AGPL-3.0" in refused.stderr
    assert "error: the licence above is not accepted yet; run this again with --accept-licence" in refused.stderr
    monkeypatch.setattr("unidiffuser.cli.download.is_terminal", lambda: True)
    assert run("v1", "--out", folder, input="n\n").exit_code == 1
    assert hub.requests == []
    done = run("v1", "--out", folder, "-q", input="y\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == folder
    again = run("v1", "--out", folder)
    assert again.exit_code == 0
    assert "AGPL" not in again.stderr
    assert "--model" in again.stderr


def test_the_default_folder_bears_the_version(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("v1", "--accept-licence", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "unidiffuser-v1\n"), done.stderr
    assert contents(tmp_path / "unidiffuser-v1") == NEEDED | {RECORD}
    assert run("v3").exit_code == 2


def test_the_preferred_format_of_each_part_is_chosen() -> None:
    others = NEEDED - {UNET, DECODER}
    shards = [f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    decoder = "text_decoder/diffusion_pytorch_model.safetensors"
    found = needed_files(others | {UNET, DECODER, decoder, index, *shards})
    assert {index, decoder, *shards} <= set(found)
    assert not {UNET, DECODER} & set(found)
    with pytest.raises(FileNotFoundError, match="it lacks unet/diffusion_pytorch_model-00001-of-00002"):
        needed_files(others | {decoder, index, shards[1]})


def test_no_model_names_both_layouts_and_the_command(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load_checkpoint(place)
        text = str(caught.value)
        assert "\n" not in text
        for name in ("`unidiffuser download v1`", "model_index.json", "unet/", "vae/", "text_decoder/", "text_encoder/",
                     "image_encoder/", "clip_tokenizer/", "text_tokenizer/", "uvit_v1.pth", "autoencoder_kl.pth",
                     "caption_decoder.pth", "clip-vit-large-patch14/", "clip-vit-base-patch32/", "AGPL-3.0"):  # fmt: skip
            assert name in text, name
