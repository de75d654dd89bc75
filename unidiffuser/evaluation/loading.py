"""Loading of the model under evaluation and of the feature extractors that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..engine import Engine
from ..options import resolve
from ..streams import item_generators
from .clip_score import Clip
from .config import EvaluationConfig
from .digests import settings_digest, weights_digest
from .extractors import FeatureExtractors
from .features import ClipFeatures, FeatureExtractor, InceptionFeatures
from .retrieval import network_scores
from .run import EvaluatedModel
from .sampling import ModelSampler


def load_model(config: EvaluationConfig) -> tuple[EvaluatedModel, FeatureExtractors]:
    """Load the model and the extractors of a config.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not what the config says, or `dtype` is unknown.
    """
    import unidiffuser

    dtype = None if config.dtype is None else getattr(torch, config.dtype, None)
    if config.dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {config.dtype!r} is not a torch dtype; use float32, float16 or bfloat16")
    model = unidiffuser.load(config.model, device=config.device, dtype=dtype)
    weights = weights_digest(model.checkpoint)
    dtypes = " ".join(str(kind).removeprefix("torch.") for kind in (model.dtype, model.encoder_dtype))
    name = f"{weights} {dtypes} {settings_digest(model.config.to_dict())[:12]}"
    features: FeatureExtractor
    if config.features == "clip":
        features = ClipFeatures(model.image_token_encoder, f"clip of {weights[:12]}")
    else:
        features = InceptionFeatures(config.features, model.device)
    extractors = FeatureExtractors(
        features=features,
        side=config.image_size or model.config.image_size,
        clip=None if config.clip is None else Clip(config.clip, model.device),
    )
    return EvaluatedModel(name, partial(ModelSampler, model), partial(score_captions, model)), extractors


def score_captions(
    model: Engine, images: Sequence[Image.Image], captions: Sequence[str], levels: int, seed: int
) -> NDArray[np.float32]:
    """Scores (N, M): how much each of M captions lowers the denoising error of each of N pictures.

    See `unidiffuser.scoring` for the score.
    """
    options = resolve({}, model.config)
    streams = model.encode_images(list(images), 1, options, [item_generators(seed, 1)[0] for _ in images])
    texts = model.encode_texts(captions)
    with model.on_device(model.net) as net:
        return network_scores(net, streams, texts, levels, seed)
