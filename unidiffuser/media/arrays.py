"""Pictures given as numpy arrays and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMS = "numpy uint8 (H, W, 3) or (H, W, 4), or torch (3, H, W) with values in [0, 1]"


def is_array(value: Any) -> bool:
    """Whether a value is a numpy array or a tensor."""
    return isinstance(value, (np.ndarray, Tensor))


def check_values(array: np.ndarray | Tensor, name: str) -> None:
    """Refuse what holds no plain numbers: sparse tensors, those on "meta", complex numbers, texts, or no elements at all.

    Raises:
        ValueError: says what it is.
    """
    if isinstance(array, Tensor) and (array.layout != torch.strided or array.device.type == "meta"):
        raise ValueError(f"{name} is a tensor without plain values ({array.layout} on {array.device}); give {FORMS}")
    if array.dtype.is_complex if isinstance(array, Tensor) else array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype}; give {FORMS}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: an array of shape {tuple(array.shape)}")


def items_of(batch: np.ndarray | Tensor) -> list[Any]:
    """The pictures of an array: itself, or those along its first axis if it has four."""
    return list(batch) if batch.ndim == 4 else [batch]


def picture_of(array: np.ndarray | Tensor, name: str) -> Image.Image:
    """A picture from pixels, of mode "L", "RGB" or "RGBA".

    Args:
        array: numpy uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or torch (1, 3 or 4, H, W) in [0, 1].
        name: of the picture, for error messages.

    Raises:
        ValueError: another shape, type or range of values.
    """
    return _from_tensor(array, name) if isinstance(array, Tensor) else _from_numpy(array, name)


def _from_numpy(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"{name} is an array of shape {array.shape}; give {FORMS}")
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is an array of {array.dtype}; give {FORMS}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: an array of shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_tensor(tensor: Tensor, name: str) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name} is a tensor of shape {tuple(tensor.shape)}; give {FORMS}")
    check_values(tensor, name)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is a tensor of {tensor.dtype}; give {FORMS}")
    values = tensor.detach().float().cpu()
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN fails as well
        raise ValueError(f"{name} is a tensor with values from {low:g} to {high:g}; give {FORMS}")
    return _from_numpy((values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), name)
