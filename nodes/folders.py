"""Folders of checkpoints: models/unidiffuser, models/checkpoints, and the bundled model."""

from __future__ import annotations

from pathlib import Path, PurePath

import folder_paths

from ..unidiffuser.checkpoints.checkpoint import ASSETS
from ..unidiffuser.media.json_files import brief
from ..unidiffuser.runtime.fast_lora import SUFFIX, fast_lora_of

FOLDER = "unidiffuser"
BUNDLED = "emoji"
EXTENSIONS = {".safetensors", ".pth", ".bin", ".json"}
FAST = " (fast)"  # ends the name of a checkpoint that is loaded with its fast LoRA
LINK = "https://huggingface.co/thu-ml/unidiffuser-v1"


def register() -> None:
    """Register models/unidiffuser with the host, beside the folders of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, EXTENSIONS)  # without extensions a new key lists every file


def model_names() -> list[str]:
    """Choices of "Load UniDiffuser": the bundled model, then every file that can be the main file of a checkpoint.

    A checkpoint with a fast LoRA beside it is there twice, the second time with `FAST` after its name.
    """
    names = [n for n in folder_paths.get_filename_list(FOLDER) if _is_main_file(n, folder_paths.get_filename_list(FOLDER))]
    names += [n for n in folder_paths.get_filename_list("checkpoints") if n not in names]
    return [choice for name in (BUNDLED, *names) for choice in (name, *([name + FAST] if fast_lora(name) else ()))]


def split_choice(choice: str) -> tuple[str, bool]:
    """The name of a checkpoint, and whether its fast LoRA is asked for, of a choice of `model_names`."""
    return (choice.removesuffix(FAST), True) if choice.endswith(FAST) else (choice, False)


def fast_lora(name: str) -> Path | None:
    """The fast LoRA beside a checkpoint; None if there is none, or no such checkpoint."""
    try:
        return fast_lora_of(ASSETS / f"{BUNDLED}.safetensors" if name == BUNDLED else model_path(name))
    except FileNotFoundError:
        return None


def _is_main_file(name: str, all_names: list[str]) -> bool:
    path = PurePath(name.replace("\\", "/"))
    if path.name.endswith(SUFFIX) and _is_beside_its_checkpoint(name.replace("\\", "/"), all_names):
        return False
    if path.name == "model_index.json":
        return True
    if path.suffix in (".pth", ".bin"):
        return path.name.startswith("uvit")
    in_diffusers_folder = any(
        str(parent / "model_index.json") in {n.replace("\\", "/") for n in all_names} for parent in path.parents
    )
    return path.suffix == ".safetensors" and not in_diffusers_folder


def _is_beside_its_checkpoint(name: str, all_names: list[str]) -> bool:
    stem = name.removesuffix(SUFFIX)
    listed = {n.replace("\\", "/") for n in all_names}
    return any(stem + end in listed for end in (".safetensors", ".pth", "/model_index.json"))


def model_path(name: str) -> str:
    """The argument of `load_checkpoint` for a name of `model_names`: a file, a diffusers folder, or the bundled name.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    if name == BUNDLED:
        return name
    for folder in (FOLDER, "checkpoints"):
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return str(Path(path).parent) if PurePath(path).name == "model_index.json" else path
    raise FileNotFoundError(
        f"The checkpoint {brief(name)} is not in models/{FOLDER} or models/checkpoints. Put it there and press R, or choose "
        f"another. The 1 B model is at {LINK} (weights under AGPL-3.0); the help page of this node has the command for it."
    )
