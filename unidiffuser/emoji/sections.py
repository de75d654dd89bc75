"""A recipe carried out: its sections in order, each in a folder of its own, finished ones skipped and interrupted ones resumed.

A section writes `section.json` into its folder when it begins, with its settings and the digests of what it reads, and again
when it ends, with the digests of what it has written. So a change of the recipe, of the pictures or of a result is noticed
before anything is trained, and it is refused: nothing that took minutes to train is overwritten.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.captioned import INDEX, matches, read_listed
from ..evaluation.digests import file_digest, settings_digest
from ..media.files import locked, replacing, write_text
from ..training.loop import train
from .assemble import assemble
from .autoencoder import AutoencoderStage
from .captioner import CaptionerStage
from .decoder import DecoderStage
from .image_encoder import ImageEncoderStage
from .image_folder import CONCEPT, STYLE
from .network import NetworkStage
from .options import Where
from .recipe import Recipe
from .text_encoder import TextEncoderStage
from .words import vocabulary_of

log = logging.getLogger(__name__)

MODEL = "model.safetensors"
RECORD = "section.json"
FREE = frozenset({"save_every", "sample_every", "sample_prompts", "compile", "cuda_graphs"})
"""Settings that may change within a run: results stay equal, up to rounding."""


@dataclass(frozen=True)
class Run:
    """What a section works with: the recipe, the image folder, and the folder of all sections."""

    recipe: Recipe
    data: Path
    out: Path
    progress: bool

    def train(self, section: Any, folder: Path, stage: Callable[..., Any], *inputs: Path) -> None:
        """Train one stage in a folder."""
        config = section.config(folder.name, folder, self.recipe.seed, self.recipe.precision)
        train(stage(config, section, self.data, *inputs), config, progress=self.progress)


def _autoencoder(run: Run, folder: Path) -> None:
    run.train(run.recipe.autoencoder, folder, AutoencoderStage)


def _encoders(run: Run, folder: Path) -> None:
    run.train(run.recipe.encoders.text, folder / "text", TextEncoderStage)
    run.train(run.recipe.encoders.image, folder / "image", ImageEncoderStage)


def _captioner(run: Run, folder: Path) -> None:
    run.train(run.recipe.captioner, folder, CaptionerStage, run.out / "encoders/text")


def _network(run: Run, folder: Path) -> None:
    parts, encoders = folder / "encoders.safetensors", run.out / "encoders"
    drawn = [pair.fields for pair in read_listed(run.data) if matches(pair.fields, run.recipe.network.where)]
    words = vocabulary_of((record[CONCEPT] for record in drawn), (record[STYLE] for record in drawn))
    assemble(run.out / "autoencoder", encoders / "text", encoders / "image", run.out / "captioner", words, parts)
    run.train(run.recipe.network, folder, NetworkStage, parts)


def _finish(run: Run, folder: Path) -> None:
    run.train(run.recipe.finish, folder, DecoderStage, run.out / "network" / MODEL)


@dataclass(frozen=True)
class Section:
    """A section of the recipe.

    Attributes:
        work: trains it in its folder, or resumes.
        results: files in its folder that later sections read.
        needs: sections whose results it reads.
    """

    work: Callable[[Run, Path], None]
    results: tuple[str, ...]
    needs: tuple[str, ...] = ()


SECTIONS: Mapping[str, Section] = {
    "autoencoder": Section(_autoencoder, ("autoencoder.pt", "autoencoder.json")),
    "encoders": Section(_encoders, ("text/text.pt", "text/text.json", "image/image.pt", "image/image.json")),
    "captioner": Section(_captioner, ("caption.pt", "caption.json"), ("encoders",)),
    "network": Section(_network, (MODEL,), ("autoencoder", "encoders", "captioner")),
    "finish": Section(_finish, (MODEL,), ("network",)),
}


def train_recipe(recipe: Recipe, out: Path, progress: bool = True) -> Path:
    """Carry out a recipe, or what is left of it.

    Args:
        recipe: all settings.
        out: folder of the sections.
        progress: show progress bars.

    Returns:
        the finished model, `out/model.safetensors`.

    Raises:
        FileNotFoundError: the image folder or a picture of it is missing.
        ValueError: several processes, or another process that works in `out`; pictures that do not fit the recipe; a section in
            `out` that belongs to another recipe, other pictures or other results.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a recipe runs in one process, as its network is small; start it with python, not with torchrun")
    run = Run(recipe, Path(recipe.data.folder), out, progress)
    if recipe.data.prepare is not None:
        from .prepare import prepare

        given = recipe.data.prepare
        prepare(run.data, given.size, Path(given.packages) if given.packages else None, given.workers)
    check_pictures(recipe, run.data)
    with locked(out / ".lock", f"the folder {out}"):
        _sections(run, folder_digest(run.data))
        with replacing(out / MODEL) as temporary:
            shutil.copyfile(out / "finish" / MODEL, temporary)
    return out / MODEL


def _sections(run: Run, data: str) -> None:
    """Carry out what is left of all sections; `data` is the digest of the image folder."""
    recipe, out = run.recipe, run.out
    finished = check_sections(recipe, out, data)
    for name, section in SECTIONS.items():
        if name in finished:
            log.info("%s: finished before", name)
            continue
        log.info("%s: %s", name, "resumes" if (out / name / RECORD).is_file() else "begins")
        finished[name] = _carried_out(section, run, out / name, _record(recipe, name, data, finished))
    records = [json.loads((out / name / RECORD).read_text(encoding="utf-8")) for name in SECTIONS]
    log.info("all sections: %.0f s", sum(record["seconds"] for record in records))


def _carried_out(section: Section, run: Run, folder: Path, record: dict[str, Any]) -> str:
    """Train a section and record it; a digest of its results."""
    write_text(folder / RECORD, json.dumps(record, indent=1))
    began = time.monotonic()
    section.work(run, folder)
    results = {file: file_digest(folder / file) for file in section.results}
    seconds = round(time.monotonic() - began, 1)
    write_text(folder / RECORD, json.dumps(record | {"results": results, "seconds": seconds}, indent=1))
    log.info("%s: finished in %.0f s", folder.name, seconds)
    return settings_digest(results)


def _record(recipe: Recipe, name: str, data: str, finished: Mapping[str, str]) -> dict[str, Any]:
    """What `section.json` has of a section that begins."""
    settings = {"seed": recipe.seed, "precision": recipe.precision, **asdict(getattr(recipe, name))}
    inputs = {"data": data} | {need: finished[need] for need in SECTIONS[name].needs if need in finished}
    made: dict[str, Any] = json.loads(json.dumps({"settings": settings, "inputs": inputs}))
    return made


def check_sections(recipe: Recipe, out: Path, data: str) -> dict[str, str]:
    """Compare the sections in a folder with a recipe.

    Args:
        recipe: all settings.
        out: folder of the sections.
        data: digest of the image folder.

    Returns:
        the finished sections, and a digest of the results of each.

    Raises:
        ValueError: a section of another recipe, other pictures or other results; the text names what to remove.
    """
    finished: dict[str, str] = {}
    for name, section in SECTIONS.items():
        folder = out / name
        if not (folder / RECORD).is_file():
            if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"{folder} has no {RECORD}, so it belongs to no recipe; remove it, or use another OUT")
            continue
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if reason := _difference(record, _record(recipe, name, data, finished), section, folder):
            later = [other for other in SECTIONS if name in _all_needs(other) and (out / other).is_dir()]
            folders = " and ".join(str(out / other) for other in [name, *later])
            raise ValueError(f"{reason}; remove {folders} to train again, or use another OUT")
        if "results" in record:
            finished[name] = settings_digest(record["results"])
    return finished


def _difference(record: Mapping[str, Any], wanted: Mapping[str, Any], section: Section, folder: Path) -> str | None:
    """How the record of a section differs from the recipe, the pictures and the files, in words; None if it does not."""
    before, now = _flat(record["settings"]), _flat(wanted["settings"])
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split(".")[-1] not in FREE:
            there, here = before.get(key, "absent"), now.get(key, "absent")
            return f"{folder} was trained with {key} {there}, the recipe has {here}"
    for need in ("data", *section.needs):
        if need not in wanted["inputs"]:
            return f"{folder} was trained on the results of {folder.parent / need}, which is not finished"
        if record["inputs"].get(need) != wanted["inputs"][need]:
            what = "other pictures or captions" if need == "data" else f"other results of {folder.parent / need}"
            return f"{folder} was trained on {what}"
    for file, digest in record.get("results", {}).items():
        if not (folder / file).is_file() or file_digest(folder / file) != digest:
            return f"{folder / file} is missing or changed since the section ended"
    return None


def _all_needs(name: str) -> set[str]:
    """The sections whose results a section reads, directly or through others."""
    needs = SECTIONS[name].needs
    return {*needs}.union(*(_all_needs(need) for need in needs))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names, as "palette.colours"."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def check_pictures(recipe: Recipe, folder: Path) -> None:
    """See that an image folder has what a recipe needs.

    Raises:
        FileNotFoundError: no `metadata.jsonl`.
        ValueError: records without a field, or a filter that no training picture passes.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"data.folder {folder} has no {INDEX}; name an image folder, or add `prepare` to `data`")
    records = [pair.fields for pair in read_listed(folder) if pair.split in ("", "train")]
    for field in (CONCEPT, STYLE):
        if missing := sum(field not in record for record in records):
            raise ValueError(f"{missing} records of {folder / INDEX} lack {field!r}, which the recipe needs; add it")
    filters: dict[str, Where] = {}
    for key, value in _flat(asdict(recipe)).items():
        section, found, field = key.rpartition(".where.")
        if found:
            filters.setdefault(section, {})[field] = value
    for section, chosen in filters.items():
        if not any(matches(record, chosen) for record in records):
            raise ValueError(f"{section}.where: no training picture of {folder} has {chosen}; change the filter")
    for style in recipe.autoencoder.palette.styles:
        if not any(matches(record, {**recipe.autoencoder.where, STYLE: style}) for record in records):
            raise ValueError(f"autoencoder.palette.styles: no picture of autoencoder.where has the style {style!r}; remove it")


def folder_digest(folder: Path) -> str:
    """SHA-256 over `metadata.jsonl` and all pictures that it lists.

    Raises:
        FileNotFoundError: a listed picture is missing.
    """
    paths = [folder / INDEX, *(pair.path for pair in read_listed(folder))]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise FileNotFoundError(f"{folder / INDEX} lists {missing}, which is missing; restore it, or remove its line")
    digest = sha256()
    with ThreadPoolExecutor() as pool:
        for found in pool.map(file_digest, paths):
            digest.update(bytes.fromhex(found))
    return digest.hexdigest()
