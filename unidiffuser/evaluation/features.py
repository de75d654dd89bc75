"""Feature extractors for FID, KID, diversity and memorisation.

`clip` is the checkpoint's own CLIP image encoder, available for every model; a path is Inception's weights, the choice of
the literature. Figures of different extractors cannot be compared, so a report names the one it used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..encoders.clip import ImageTokenEncoder
from ..media.images import to_tensor
from .digests import file_digest
from .inception import Inception

Features = NDArray[np.float32]


class FeatureExtractor(Protocol):
    """Square RGB pictures of one size -> features (B, D); `name` identifies the extractor and its weights."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Sequence[Image.Image]) -> Features: ...


class ClipFeatures:
    """Projected embeddings of a CLIP image encoder, not normalised."""

    def __init__(self, encoder: ImageTokenEncoder, name: str):
        self.encoder, self.name = encoder, name

    def __call__(self, images: Sequence[Image.Image]) -> Features:
        tokens: Features = self.encoder(images)[:, 0].float().cpu().numpy()
        return tokens


class InceptionFeatures:
    """Pooled features of FID's Inception, with pictures scaled to 299 pixels as in pytorch-fid.

    Args:
        weights: the file `pt_inception-2015-12-05-6726825d.pth`.
        device: where to run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other weights.
    """

    def __init__(self, weights: str | Path, device: torch.device):
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"features: {path} does not exist; give pytorch-fid's file pt_inception-2015-12-05-6726825d.pth, "
                "or set `features: clip`"
            )
        self.net = Inception()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            kept = {name: value for name, value in state.items() if not name.startswith("fc.")}  # the classifier is not used
            self.net.load_state_dict(kept)
        except Exception as error:  # torch.load raises many kinds of errors for a file without weights
            raise ValueError(f"features: {path} is not pytorch-fid's Inception ({str(error).splitlines()[0]})") from error
        self.net.eval().requires_grad_(False).to(device)
        self.device, self.name = device, f"inception {file_digest(path)[:12]}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Features:
        features: Features = self.net(to_tensor(images).to(self.device)).float().cpu().numpy()
        return features
