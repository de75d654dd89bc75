"""CLIP score (Hessel et al. 2021, arXiv 2104.08718) and CLIP embeddings for retrieval.

The encoders of a UniDiffuser checkpoint cannot give it: its image encoder (ViT-B/32) and its text encoder (ViT-L/14) belong
to two CLIP models and share no space. The CLIP model is read from a local folder; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..encoders.clip import ImageTokenEncoder
from ..media.json_files import read_object
from .digests import file_digest

Embeddings = NDArray[np.float32]


class Clip:
    """Image and text encoder of a CLIP model.

    Args:
        folder: `config.json`, `model.safetensors`, tokenizer and preprocessor files, such as openai/clip-vit-large-patch14.
        device: where to run.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: not a CLIP model.
    """

    def __init__(self, folder: str | Path, device: torch.device):
        from transformers import AutoTokenizer, CLIPModel

        path = Path(folder)
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"clip: {path / 'model.safetensors'} does not exist; give the folder of a CLIP model as transformers saves it, "
                "such as a download of openai/clip-vit-large-patch14, or remove `clip`"
            )
        try:
            self.model = CLIPModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            normal = read_object(path / "preprocessor_config.json")
            # Only its preprocessing is used; the projection is part of the CLIP model.
            self.preprocess = ImageTokenEncoder(self.model.vision_model, normal["image_mean"], normal["image_std"]).preprocess
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"clip: {path} is not a complete CLIP model of transformers ({error})") from error
        self.device, self.name = device, f"clip {file_digest(path / 'model.safetensors')[:12]}"

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Square pictures (B of them) -> (B, D) embeddings of length 1."""
        output = self.model.vision_model(pixel_values=self.preprocess(images).to(self.device))
        return _unit(self.model.visual_projection(output.pooler_output))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """(B, D) embeddings of length 1; longer texts are truncated."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))


def clip_scores(images: Embeddings, texts: Embeddings) -> NDArray[np.float64]:
    """CLIP score of each picture with its caption: max(cosine, 0) of unit vectors (N, D), (N, D) -> (N,).

    The plain cosine, as in UniDiffuser's figures: without Hessel's factor of 2.5, not times 100.
    """
    return np.maximum((images.astype(np.float64) * texts).sum(axis=1), 0.0)


def _unit(vectors: torch.Tensor) -> Embeddings:
    embeddings: Embeddings = torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
    return embeddings
