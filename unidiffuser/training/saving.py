"""Checkpoints of a run by torch.distributed.checkpoint: complete or absent, and readable by any number of processes.

A checkpoint is a folder such as `checkpoints/00000500`. Each process writes its part into a hidden folder beside it; the main
process adds `run.json` (the step, and the settings that must not change) and renames the folder. A folder with a final name is
therefore complete, whenever a process was killed. DDP and FSDP2 load each other's checkpoints.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._traverse import get_element, set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from ..distributed import World
from ..media.json_files import brief, read_object
from .average import Average

log = logging.getLogger(__name__)

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are rebuilt from their source


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("[0-9]*") if (p / "run.json").is_file())


def last_good(out: Path) -> str:
    """Path of the newest checkpoint of a run, for messages."""
    return str(max(checkpoints(out), default="none yet"))


def remove_unfinished(out: Path) -> None:
    """Remove the checkpoints that a killed run did not finish."""
    for partial in (out / "checkpoints").glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _state(model: nn.Module, optimizers: Sequence[Optimizer], average: Average) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizers, options=TRAINED),
        "average": average.shadow,
    }


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    average: Average,
    run: dict[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write the state after `step` steps, and remove all but the newest `keep` checkpoints. Every process calls this.

    Raises:
        OSError: it cannot be written; the checkpoints before it are untouched.
    """
    final = out / "checkpoints" / f"{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    shapes = {name: list(shadow.shape) for name, shadow in average.shadow.items()}
    try:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        with _single_process_is_fine():
            dcp_save(_state(model, optimizers, average), storage_writer=FileSystemWriter(partial, sync_files=True))
        if world.main:
            with (partial / "run.json").open("w", encoding="utf-8") as file:
                json.dump({"step": step, **run, "shapes": shapes}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
    except (OSError, CheckpointException) as error:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        number, reason = _cause(error)
        last = last_good(out)
        raise OSError(number, f"cannot write a checkpoint ({reason}); the last good one is {last}", str(final)) from None
    if world.main:
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def resume(
    out: Path, model: nn.Module, optimizers: Sequence[Optimizer], average: Average, run: dict[str, Any], world: World
) -> int:
    """Load the newest checkpoint of a run, if there is one. Every process calls this.

    Args:
        run: settings that must not change within a run: "stage", "batch_size", "seed", "data".

    Returns:
        the number of steps done; 0 for a new run.

    Raises:
        ValueError: the checkpoint is of another model or run (the message names the difference), is damaged, or holds
            anything but tensors and plain values, which could run code.
    """
    if world.main:
        for stale in (out / "checkpoints").glob(".*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
    world.barrier()
    found = checkpoints(out)
    if not found:
        return 0
    newest = found[-1]
    saved = read_object(newest / "run.json", "remove the folder to go on from the one before it")
    step, there = saved.get("step"), saved.get("shapes")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(there, dict):
        raise ValueError(f"{newest / 'run.json'} has no step and shapes; remove the folder to go on from the one before it")
    differing = [
        f"{key} {brief(saved.get(key))} there, {value!r} here" for key, value in run.items() if saved.get(key) != value
    ]
    shapes = {name: list(shadow.shape) for name, shadow in average.shadow.items()}
    names = sorted(n for n in shapes.keys() | there.keys() if shapes.get(n) != there.get(n))
    if names:
        name = names[0]
        here, other = (brief(s.get(name, "absent")) for s in (shapes, there))
        differing.append(f"{len(names)} weights, as {name[:200]}: {other} there, {here} here")
    if differing:
        raise ValueError(f"{newest} belongs to another config ({'; '.join(differing)}): use that config, or another `out`")
    state = _state(model, optimizers, average)
    _load(state, newest)
    set_model_state_dict(model, state["model"], options=TRAINED)
    set_optimizer_state_dict(model, optimizers, state["optimizer"], options=TRAINED)
    log.info("resuming %s at step %d", out, step)
    return step


def load_average(out: Path, model: nn.Module) -> nn.Module:
    """Load the averaged weights of a run, finished or not, into a model of one process.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    found = checkpoints(out)
    if not found:
        raise FileNotFoundError(f"{out} has no checkpoint yet")
    state = {"average": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}}
    _load(state, found[-1])
    return model.eval()


def _load(state: dict[str, Any], folder: Path) -> None:
    """Load a checkpoint into the tensors of `state`, in place."""
    try:
        with _single_process_is_fine():
            dcp_load(state, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} cannot be read ({reason}); remove it to go on from the one before it") from error


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model, on the CPU of the first process; empty elsewhere. Every process calls this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


_LIKE: dict[type, tuple[type, ...]] = {float: (float, int), int: (int, float), tuple: (tuple, list), list: (tuple, list)}
"""Types of a plain value that may replace one of another type."""


class _Planner(DefaultLoadPlanner):
    """Loads plain values (learning rates, betas) without running code; torch's own planner unpickles anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"asks for {asked[1]} and could run code" if asked else "is damaged, or no plain value"
            raise ValueError(f"{name} {reason}; resume only runs that you trust") from error
        now = get_element(self.original_state_dict, self.mappings[name])
        if now is not None and not isinstance(loaded, _LIKE.get(type(now), type(now))):
            raise ValueError(f"{name} is {brief(loaded)}, but must be like {brief(now)}; the checkpoint is damaged")
        set_element(self.original_state_dict, self.mappings[name], loaded)


class _Reader(FileSystemReader):
    """Reads the index of a checkpoint, a pickle, with a closed list of classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Finds torch's dtypes and the classes listed; whole packages would not do, as their modules import os, pickle and io."""

    METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    ALLOWED = frozenset(
        {
            (METADATA, "BytesStorageMetadata"),
            (METADATA, "ChunkStorageMetadata"),
            (METADATA, "Metadata"),
            (METADATA, "MetadataIndex"),
            (METADATA, "StorageMeta"),
            (METADATA, "TensorProperties"),
            (METADATA, "TensorStorageMetadata"),
            (METADATA, "_MEM_FORMAT_ENCODING"),
            (FILES, "_StorageInfo"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),  # looks a name up among torch's layouts
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
            ("pathlib._local", "WindowsPath"),
        }
    )

    def __init__(self, file: IO[bytes]):
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise ValueError(f"the checkpoint's index names {module}.{name}, which no index needs: it is damaged or hostile")


class _single_process_is_fine(warnings.catch_warnings):
    """Silences torch's warning that no process group exists."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")


def _cause(error: BaseException) -> tuple[int, str]:
    """Number and text of the OSError behind a failed save; torch's writer wraps it in an exception of its own."""
    failures = [f[0] if isinstance(f, tuple) else f for f in getattr(error, "failures", {}).values()]
    for failure in [error, *failures]:
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, OSError):
                return inner.errno or errno.EIO, inner.strerror or str(inner)
            inner = inner.__cause__ or inner.__context__
    return errno.EIO, str([*failures, error][0]).strip().splitlines()[-1]
