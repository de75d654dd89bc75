"""Checkpoints: opening, loading into modules, writing and converting.

`load_checkpoint` reads this project's single file, the original uvit_v0.pth or uvit_v1.pth with its neighbours, or a diffusers
folder; each layout has its own module, layout_*.py. `save_checkpoint` and `convert` write the single file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .config import CaptionConfig, ModelConfig, VAEConfig
from .keys import PARTS, Recipes, apply
from .layout_diffusers import read_diffusers
from .layout_original import read_original
from .layout_own import FORMAT, TOKENIZERS, read_own, target_dtype, write_own
from .parts import TITLES, CheckpointContents, InMemoryTensors, ModelPart, make_part
from .published import HOW_TO_GET, LICENCE
from .sizes import check_parts_fit
from .skeleton import assign_weights, skeleton
from .tokenizers import END, START, BytePairTokenizer, Spec, check_spec, clip_spec, gpt2_spec
from .weights import WeightFiles

__all__ = ["CaptionConfig", "Checkpoint", "ModelConfig", "VAEConfig", "convert", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("emoji",)
_PUBLISHED = f"from huggingface.co/thu-ml/unidiffuser-v1 (published under {LICENCE}, whose terms then apply)"
_WHAT_TO_GET = {
    "uvit": f"uvit_v1.pth {_PUBLISHED}",
    "vae": f"autoencoder_kl.pth {_PUBLISHED}",
    "caption": f"caption_decoder.pth {_PUBLISHED}",
    "clip_text": "a folder with config.json and model.safetensors of huggingface.co/openai/clip-vit-large-patch14",
    "clip_image": "a folder with config.json and model.safetensors of huggingface.co/openai/clip-vit-base-patch32",
}
Module = TypeVar("Module", bound=nn.Module)


class Checkpoint:
    """A checkpoint on disk, of any layout; weights are memory-mapped on access.

    Attributes:
        path: the file or folder.
        config: sizes of all parts; those of an absent part are v1's.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        parts: dict[str, ModelPart],
        tokenizers: dict[str, Spec] | None = None,
        skipped: tuple[str, ...] = (),
    ):
        self.path, self.config = path, config
        self._parts, self._tokenizers, self._skipped = parts, tokenizers or {}, skipped

    def parts(self) -> tuple[str, ...]:
        """Present parts of "uvit", "vae", "clip_text", "clip_image", "caption"."""
        return tuple(name for name in PARTS if name in self._parts)

    @torch.inference_mode(False)  # weights outlive the call, whatever its mode
    def state_dict(
        self,
        part: str,
        prefix: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of a part under canonical names (see `keys`).

        Tensors that are returned as stored are memory-mapped: they take memory once touched, and writing to one does not change
        the file. On another device or in another dtype they are copies, made one by one.

        Args:
            part: "uvit", "vae", "clip_text", "clip_image" or "caption".
            prefix: return only the tensors whose names begin with it, under names without it.
            device: None for the CPU.
            dtype: of the floating-point tensors; None keeps each as stored.

        Raises:
            FileNotFoundError: the part is absent; the text says what to download.
            ValueError: there is no part of this name.
        """
        found = self._part(part)
        names = [name for name in found.shapes if name.startswith(prefix)]
        same_dtype = dtype is None or all(target_dtype(found.shapes[name], dtype) == found.shapes[name].dtype for name in names)
        if same_dtype and torch.device(device or "cpu").type == "cpu":
            tensors = found.tensors()
            return {name.removeprefix(prefix): tensors[name] for name in names}
        return {
            name.removeprefix(prefix): tensor.to(device=device, dtype=target_dtype(tensor, dtype), copy=True)
            for name, tensor in found.stream(names)
        }

    @torch.inference_mode(False)
    def load_into(
        self,
        module: Module,
        part: str,
        prefix: str = "",
        rename: Callable[[Iterable[str]], Recipes] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Module:
        """Assign a part's tensors to a module and set it to evaluation mode.

        Peak resident memory is about what the loaded module occupies.

        Args:
            module: a module of the part's sizes, best built in `skeleton.skeleton`.
            part, prefix, device, dtype: as for `state_dict`.
            rename: recipes for the module's names from the canonical ones; None if they are equal.

        Returns:
            The same module.

        Raises:
            FileNotFoundError: the part is absent.
            ValueError: the tensors are not the module's; names the file and the first missing, unexpected and misshapen one.
        """
        tensors = self.state_dict(part, prefix, device, dtype)
        if rename is not None:
            tensors = apply(rename(tensors), tensors)
        where = f"the {TITLES[part]} in {self._part(part).source.name}"
        assign_weights(module, tensors, where, f"If this is the wrong file, get {_WHAT_TO_GET[part]}.")
        module.to(device=device)  # moves tables of positions and masks, which no checkpoint holds
        return module.eval()

    @contextmanager
    def building(self, part: str) -> Iterator[None]:
        """Context for building a module from a part's config: a `skeleton`, in which a config that describes no network fails
        with a ValueError of one line. Libraries raise almost anything then.
        """
        try:
            with skeleton():
                yield
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(
                f"the {TITLES[part]} of {self.path} cannot be built from its configuration ({reason[:200]}); download or "
                "convert it again."
            ) from error

    def clip_tokenizer(self) -> BytePairTokenizer:
        """The text encoder's tokenizer; CLIP's published one if the checkpoint has none.

        Raises:
            ValueError: the checkpoint's is damaged, or has tokens that the text encoder does not know.
        """
        return self._tokenizer("clip_tokenizer", clip_spec, (START, END), self.config.clip_text.get("vocab_size", 49408))

    def gpt2_tokenizer(self) -> BytePairTokenizer:
        """The caption decoder's tokenizer; GPT-2's with a stop token if there is none.

        Raises:
            ValueError: the checkpoint's is damaged.
        """
        return self._tokenizer("gpt2_tokenizer", gpt2_spec, (), None)

    def _tokenizer(
        self, name: str, published: Callable[[], Spec], needed: tuple[str, ...], size: int | None
    ) -> BytePairTokenizer:
        spec = self._tokenizers.get(name) or published()
        try:
            check_spec(spec, needed, size)
            return BytePairTokenizer.from_spec(spec)
        except ValueError as error:
            raise ValueError(f"the {name} of {self.path} is damaged ({error}); download or convert it again.") from error

    def tokenizer_specs(self) -> dict[str, Spec]:
        """Both tokenizers, as `save_checkpoint` takes them."""
        return {"clip_tokenizer": self.clip_tokenizer().spec, "gpt2_tokenizer": self.gpt2_tokenizer().spec}

    def _part(self, name: str) -> ModelPart:
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r}; use one of {', '.join(PARTS)}.")
        if name not in self._parts:
            skipped = "".join(f" Skipped: {reason}" for reason in self._skipped)
            place = "beside it" if self.path.is_file() else "into it"
            raise FileNotFoundError(
                f"{self.path} has no {TITLES[name]}, which this needs. Put {place}: {_WHAT_TO_GET[name]}.{skipped}"
            )
        return self._parts[name]


def load_checkpoint(path_or_name: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of any layout without reading its weights.

    Parts may be absent; the error is raised where one is needed.

    Args:
        path_or_name: the name of a bundled model ("emoji"), a file or a folder.

    Raises:
        FileNotFoundError: there is no such model, file or folder.
        ValueError: it is damaged, unsafe or no checkpoint of a known layout.
    """
    path = Path(path_or_name)
    if str(path_or_name) in BUNDLED:
        path = ASSETS / f"{path_or_name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, so there is no bundled model {str(path_or_name)!r}; install unidiffuser again."
            )
    if path.is_dir():
        contents = _read_folder(path)
    elif path.is_file():
        source = WeightFiles(path)
        metadata = source.metadata()
        contents = read_own(source, metadata) if metadata.get("format") == FORMAT else read_original(path)
    else:
        raise FileNotFoundError(
            f"there is no model {str(path_or_name)!r}: neither a bundled one ({', '.join(BUNDLED)}) nor a file or folder. "
            f"{HOW_TO_GET}"
        )
    try:
        check_parts_fit(contents.config, contents.parts)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}.") from None
    return Checkpoint(path, contents.config, contents.parts, contents.tokenizers, contents.skipped)


def _read_folder(path: Path) -> CheckpointContents:
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return read_diffusers(path)
    contents = read_original(path)
    if not contents.parts:
        raise FileNotFoundError(
            f"{path} holds no model: it has neither model_index.json (a diffusers folder) nor uvit_v0.pth or uvit_v1.pth. "
            f"{HOW_TO_GET}"
        )
    return contents


def save_checkpoint(
    path: str | os.PathLike[str],
    config: ModelConfig,
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    tokenizers: Mapping[str, Spec] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model to the single safetensors file, atomically.

    Args:
        path: the file; replaced if it exists.
        config: sizes of the parts.
        state_dicts: for each part its tensors, under canonical names, diffusers' or transformers'.
        tokenizers: "clip_tokenizer" and "gpt2_tokenizer", each {"vocab": {token: id}, "merges": ["a b", ...]}; an absent one is
            the published one.
        dtype: float32, float16 or bfloat16 for all floating-point tensors; None keeps each, bit for bit.

    Raises:
        OSError: the file cannot be written.
        ValueError: an unknown part, tokenizer or dtype, or a value too large for float16.
    """
    unknown = [name for name in state_dicts if name not in PARTS] + [n for n in tokenizers or {} if n not in TOKENIZERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is neither a part nor a tokenizer; use {', '.join(PARTS + TOKENIZERS)}.")
    parts = {name: make_part(name, InMemoryTensors(dict(tensors))) for name, tensors in state_dicts.items()}
    write_own(Path(path), config, parts, dict(tokenizers or {}), dtype)


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Convert a checkpoint of any layout to the single safetensors file.

    Args:
        src: as for `load_checkpoint`; absent parts stay absent, with a warning.
        dst: the file to write, ending in .safetensors.
        dtype: as for `save_checkpoint`.

    Raises:
        FileNotFoundError: `src` does not exist.
        OSError: the file cannot be written.
        ValueError: another ending, or as for `load_checkpoint` and `save_checkpoint`.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"the result is one safetensors file, so {dst} should end in .safetensors; rename it.")
    checkpoint = load_checkpoint(src)
    absent = [TITLES[name] for name in PARTS if name not in checkpoint.parts()]
    if absent:
        logger.warning("%s has no %s, so %s will not have it either.", checkpoint.path, " and no ".join(absent), dst)
    tokenizers = checkpoint.tokenizer_specs()
    write_own(dst, checkpoint.config, checkpoint._parts, tokenizers, dtype)
