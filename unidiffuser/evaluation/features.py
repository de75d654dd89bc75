"""Pictures to features: the eyes through which FID, KID, diversity and memorisation look.

``clip`` is the checkpoint's own CLIP image encoder, at hand for every model; a path is Inception's weights, the choice of the
literature. Numbers of different extractors cannot be compared, so a report names the one that it used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unidiffuser.encoders.clip import ImageTokenEncoder
from unidiffuser.evaluation.identity import file_digest
from unidiffuser.evaluation.inception import Inception
from unidiffuser.media.images import to_tensor

Features = NDArray[np.float32]


class Extractor(Protocol):
    """Features (B, D) of square RGB pictures of one size; ``name`` tells it from all others, weights included."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Sequence[Image.Image]) -> Features: ...


class ClipFeatures:
    """A CLIP image encoder's projected embeddings, not normalised."""

    def __init__(self, encoder: ImageTokenEncoder, name: str):
        self.encoder, self.name = encoder, name

    def __call__(self, images: Sequence[Image.Image]) -> Features:
        tokens: Features = self.encoder(images)[:, 0].float().cpu().numpy()
        return tokens


class InceptionFeatures:
    """The pooled features of FID's Inception, pictures scaled to 299 pixels as pytorch-fid does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other weights than those of ``pt_inception-2015-12-05-6726825d.pth``.
    """

    def __init__(self, weights: str | Path, device: torch.device):
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give the file pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or `features: clip`"
            )
        self.net = Inception()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            kept = {name: value for name, value in state.items() if not name.startswith("fc.")}  # the classifier is not used
            self.net.load_state_dict(kept)
        except Exception as error:  # torch.load has no one error for "not a file of weights"
            raise ValueError(f"{path} is not pytorch-fid's Inception ({str(error).splitlines()[0]})") from error
        self.net.eval().requires_grad_(False).to(device)
        self.device, self.name = device, f"inception {file_digest(path)[:12]}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Features:
        found: Features = self.net(to_tensor(images).to(self.device)).float().cpu().numpy()
        return found
