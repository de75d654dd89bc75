"""What a task is given: prompts, pictures and masks in any form, checked before anything is computed.

With the option `on_error` an input that cannot be used does not end a list: its results are None.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..media.arrays import check_values, is_array, items_of
from ..media.files import is_text, shown
from ..media.formats import PICTURE_SUFFIXES
from ..media.images import ImageSource, fit, open_image
from ..options import Options, whole_number
from ..path import NoisePath
from ..streams import Streams, item_generators

log = logging.getLogger(__name__)

Generators = list[torch.Generator]
Prompts = str | Sequence[str]
Pictures = ImageSource | Sequence[ImageSource]
T = TypeVar("T")
SHAPES_DIFFER = 0.05  # relative difference of two aspect ratios that is worth a warning


@dataclass(frozen=True)
class Inputs(Generic[T]):
    """The usable inputs of a call.

    Attributes:
        items: the inputs.
        places: position of each in the list that was given.
        total: length of that list.
    """

    items: list[T]
    places: list[int]
    total: int

    def spread(self, results: Any, count: int) -> Any:
        """`count` results of each input at its place, None for those of inputs that were skipped.

        Arrays, tensors and streams hold the results of usable inputs only.
        """
        if len(self.items) == self.total or not isinstance(results, list):
            return results
        placed: list[Any] = [None] * (self.total * count)
        for number, place in enumerate(self.places):
            placed[place * count : (place + 1) * count] = results[number * count : (number + 1) * count]
        return placed


def read_prompts(given: Prompts, options: Options) -> Inputs[str]:
    """The prompts of a call.

    Raises:
        ValueError: an empty list, or something that is no text.
    """
    if isinstance(given, (Image.Image, os.PathLike, bytes)) or is_array(given):
        raise ValueError(f"a prompt must be a text, got {_kind(given)}; for a picture use image_to_text or vary_image")
    items = [given] if isinstance(given, str) else _list("prompt", given)
    return _usable(items, valid_prompt, "prompt", options)


def valid_prompt(value: Any, name: str) -> str:
    """A prompt; ValueError with this name for what is no text, or not valid UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {_kind(value)}")
    if not is_text(value):
        start = " ".join(shown(value[:60]).split())
        raise ValueError(f"{name}, '{start}', is not valid text: it holds bytes that are not UTF-8")
    return value


def read_pictures(given: Pictures, options: Options) -> Inputs[Image.Image]:
    """The pictures of a call, opened as RGB; see `media.images.ImageSource` for the forms.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty list, or something that is no picture; says which.
    """
    if is_array(given):
        items: list[Any] = items_of(given)  # type: ignore[arg-type]
    elif isinstance(given, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(given, "read"):
        items = [given]
    else:
        items = _list("picture", given)
    return _usable(items, open_image, "picture", options)


def _list(kind: str, given: Any) -> list[Any]:
    if given is None or not isinstance(given, Iterable):
        raise ValueError(f"the {kind} is {_kind(given)}; give one {kind} or a list of them")
    items = list(given)
    if not items:
        raise ValueError("give at least one prompt or picture, got an empty list")
    return items


def _usable(items: list[Any], make: Callable[[Any, str], T], kind: str, options: Options) -> Inputs[T]:
    """The items that `make` accepts; one that it refuses is an error, or is skipped as `on_error` says."""
    on_error = options["on_error"]
    found, places = list[T](), list[int]()
    first: Exception | None = None
    for place, item in enumerate(items):
        name = f"the {kind}" if len(items) == 1 else f"{kind} {place + 1} of {len(items)}"
        try:
            found.append(make(item, name))
            places.append(place)
        except (ValueError, FileNotFoundError) as error:
            message = str(error) if name in str(error) or len(items) == 1 else f"{name}: {error}"
            first = first or type(error)(message)
            if on_error == "raise":
                raise first from error
            if callable(on_error):
                on_error(place, error)
            else:
                log.warning("skipped: %s", message)
    if first is not None and not found:
        raise first
    return Inputs(found, places, len(items))


def texts_of(prompts: Sequence[str], negative: Prompts | None) -> list[str]:
    """All texts of a call."""
    return [*prompts, *_negative_texts(negative)]


def _negative_texts(negative: Prompts | None) -> list[str]:
    """The negative prompts of a call; ValueError that says which one is no text."""
    if negative is None:
        return []
    items = [negative] if isinstance(negative, str) else _list("negative prompt", negative)
    one = len(items) == 1
    names = ["the negative prompt" if one else f"negative prompt {k} of {len(items)}" for k in range(1, len(items) + 1)]
    return [valid_prompt(item, name) for item, name in zip(items, names, strict=True)]


def negative_latents(
    encode: Callable[[Sequence[str]], Tensor],
    negative: Prompts | None,
    places: Sequence[int],
    total: int,
    count: int,
    options: Options,
) -> Tensor | None:
    """Text latents of one negative prompt, (1, L, text_dim), or of one for each input, (B, L, text_dim).

    Args:
        encode: encodes texts.
        negative: the negative prompts.
        places: positions of the inputs that are used.
        total: number of inputs of the call.
        count: results of each input.

    Raises:
        ValueError: a number of negative prompts that is neither one nor that of the inputs.
    """
    if negative is None:
        return None
    texts = _negative_texts(negative)
    if len(texts) not in (1, total):
        raise ValueError(f"negative must be one text or one for each prompt, got {len(texts)} for {total}")
    guidance = options["guidance"]
    if (guidance[0] if isinstance(guidance, Sequence) else guidance) == 1:
        log.warning("the negative prompt has no effect, since guidance is 1 (off); use a guidance of 3 to 8")
    if len(texts) == 1:
        return encode(texts)
    return encode([texts[place] for place in places]).repeat_interleave(count, 0)


def chain_start(start: Any) -> Any:
    """The start of a Gibbs chain: a picture in any form, a prompt or None.

    Raises:
        ValueError: a text that reads as the file name of a picture, or a list.
    """
    if isinstance(start, (list, tuple)):
        raise ValueError(
            f"a chain starts from one prompt or picture, got a list of {len(start)}; use count= for several chains"
        )
    if isinstance(start, str) and Path(start).suffix.lower() in PICTURE_SUFFIXES:
        raise ValueError(
            f"start={shown(start)!r} is a text, so the chain would start from it as a prompt; for the picture of that name "
            f"give pathlib.Path({shown(start)!r})"
        )
    return start


def read_mask(mask: Any, width: int, height: int, downscale: int) -> Tensor:
    """The mask of an inpainting, at the size of the latents.

    Args:
        mask: white, 255, True or 1 = generate; black or 0 = keep. A picture in any form, or a numpy array or tensor (H, W) of
            bool, uint8 or floats in [0, 1]. Cropped and resized as the picture is.
        width, height: of the picture in pixels.
        downscale: pixels of a latent cell, along a side. A cell is generated if at least half of it is white.

    Returns:
        (1, 1, height / downscale, width / downscale) of 1 = generate, 0 = keep.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no mask, or one that generates nothing.
    """
    levels = fit(mask_picture(mask), width, height)
    cells = levels.resize((width // downscale, height // downscale), Image.Resampling.BOX)
    found = torch.tensor(list(cells.getdata())).reshape(1, 1, cells.height, cells.width) >= 128
    if not found.any():
        raise ValueError(
            f"the mask generates nothing: paint white what to generate, at least {downscale} x {downscale} pixels of it"
        )
    return found.float()


def mask_picture(mask: Any) -> Image.Image:
    """A mask, in any form that `read_mask` takes, as a picture of mode "L"."""
    if is_array(mask):
        check_values(mask, "the mask")
        values = torch.as_tensor(mask).squeeze()
        if values.ndim == 2:
            if values.dtype == torch.bool:
                values = values.float()
            if values.dtype == torch.uint8:
                values = values.float() / (255 if values.max() > 1 else 1)
            values = values.float()
            low, high = values.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"the mask has values from {float(low):g} to {float(high):g}; give bool, uint8 or numbers from 0 to 1"
                )
            return open_image(values[None], "the mask").convert("L")
    return open_image(mask, "the mask").convert("L")


def warn_of_other_shape(mask: tuple[int, int], pictures: Sequence[Image.Image]) -> None:
    """Log a warning if a mask, of this width and height, has not the shape of a picture: each is cropped to its own middle."""
    for picture in pictures:
        if abs(mask[0] * picture.height / (mask[1] * picture.width) - 1) > SHAPES_DIFFER:
            log.warning(
                "the mask is %d x %d and the picture %d x %d: each is cropped to its middle, so they may not match; "
                "make the mask as large as the picture",
                *mask,
                *picture.size,
            )
            return


def check_streams(streams: Any, name: str) -> Streams:
    """Latents that were given to a task.

    Raises:
        ValueError: no `Streams`, or a stream of another shape; says what to give.
    """
    if not isinstance(streams, Streams):
        raise ValueError(f'{name} must be Streams, as output="latent" gives them, got {_kind(streams)}')
    for stream, value in streams.items():
        axes = 4 if stream == "img" else 3
        if not isinstance(value, Tensor) or value.ndim != axes:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind(value)
            raise ValueError(f"the stream {stream} of {name} must be a tensor of {axes} axes, got {found}")
    return streams


def check_path(path: Any) -> NoisePath:
    """The path of a call; ValueError that names the constructor for anything else."""
    if not isinstance(path, NoisePath):
        raise ValueError(f'path must be a NoisePath, such as NoisePath.from_points("1000,1000 0,0"), got {_kind(path)}')
    return path


def common_number(**given: Sequence[Any] | None) -> int:
    """The number of inputs of a call that gives several kinds: all of one length, or single ones.

    Raises:
        ValueError: two different lengths above 1; names both.
    """
    lengths = {name: len(items) for name, items in given.items() if items is not None and len(items)}
    if len({n for n in lengths.values() if n > 1}) > 1:
        listed = " and ".join(f"{n} {name}" for name, n in lengths.items() if n > 1)
        raise ValueError(f"got {listed}; give as many of each, or one for all")
    return max(lengths.values(), default=1)


def repeated(rows: Tensor, inputs: int, count: int) -> Tensor:
    """Rows (1 or N, ...) as (N * count, ...): `count` of each of N inputs."""
    return (rows.expand(inputs, *rows.shape[1:]) if len(rows) == 1 else rows).repeat_interleave(count, 0)


def generators_of(options: Options, inputs: int, count: int) -> Generators:
    """`count` generators for each input, input after input; candidate k has the same seed for every input."""
    whole_number("count", count, least=1)
    return [generator for _ in range(inputs) for generator in item_generators(options["seed"], count)]


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
