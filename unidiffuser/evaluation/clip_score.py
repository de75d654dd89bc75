"""A CLIP model of the user's own, for the CLIP score (Hessel et al. 2021, arXiv 2104.08718) and for retrieval.

The towers inside a UniDiffuser checkpoint cannot serve: its picture tower (ViT-B/32) and its text tower (ViT-L/14) are of two
CLIP models and share no space. Nothing is fetched; a folder as `transformers` saves it is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unidiffuser.encoders.clip import ImageTokenEncoder
from unidiffuser.evaluation.identity import file_digest

Embeddings = NDArray[np.float32]


class Clip:
    """Both towers of a CLIP model.

    Args:
        folder: config.json, model.safetensors, tokenizer and preprocessor files, such as openai/clip-vit-large-patch14.
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
                f"{path / 'model.safetensors'} does not exist: give `clip` the folder of a CLIP model as transformers saves "
                "it, such as a download of openai/clip-vit-large-patch14, or leave it out"
            )
        try:
            self.model = CLIPModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            normal = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
            # Its preparation of pictures alone; the tower's projection is in the whole model.
            self.preprocess = ImageTokenEncoder(self.model.vision_model, normal["image_mean"], normal["image_std"]).preprocess
        except (OSError, KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a whole CLIP model of transformers ({error})") from error
        self.device, self.name = device, f"clip {file_digest(path / 'model.safetensors')[:12]}"

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Square pictures (B of them) -> (B, D) embeddings of length 1."""
        seen = self.model.vision_model(pixel_values=self.preprocess(images).to(self.device))
        return _unit(self.model.visual_projection(seen.pooler_output))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """(B, D) embeddings of length 1; long texts are cut."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))


def clip_scores(images: Embeddings, texts: Embeddings) -> NDArray[np.float64]:
    """CLIP score of each picture with its caption: max(cosine, 0) of rows of length 1, (N, D), (N, D) -> (N,).

    The cosine itself, as the paper's figures plot it: without Hessel's factor of 2.5, and not times 100.
    """
    return np.maximum((images.astype(np.float64) * texts).sum(axis=1), 0.0)


def _unit(vectors: torch.Tensor) -> Embeddings:
    found: Embeddings = torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
    return found
