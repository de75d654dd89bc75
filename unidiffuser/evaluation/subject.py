"""A checkpoint and what looks at it, opened as a config says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidiffuser.emoji.judge import BUNDLED, load_judge
from unidiffuser.engine import Engine
from unidiffuser.evaluation.clip_score import Clip
from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.evaluation.eyes import Eyes
from unidiffuser.evaluation.features import ClipFeatures, Extractor, InceptionFeatures
from unidiffuser.evaluation.identity import settings_digest, weights_digest
from unidiffuser.evaluation.retrieval import network_scores
from unidiffuser.evaluation.run import Subject
from unidiffuser.evaluation.sampling import ModelSampler
from unidiffuser.options import resolve
from unidiffuser.streams import item_generators


def open_subject(config: EvaluationConfig) -> tuple[Subject, Eyes]:
    """Load the model and all that the config names; FileNotFoundError or ValueError where one is missing or not right."""
    import unidiffuser

    dtype = None if config.dtype is None else getattr(torch, config.dtype, None)
    if config.dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {config.dtype!r} is none of torch's: use float32, float16 or bfloat16")
    model = unidiffuser.load(config.model, device=config.device, dtype=dtype)
    weights = weights_digest(model.checkpoint)
    number = " ".join(str(kind).removeprefix("torch.") for kind in (model.dtype, model.side_dtype))
    name = f"{weights} {number} {settings_digest(model.config.to_dict())[:12]}"
    features: Extractor
    if config.features == "clip":
        features = ClipFeatures(model.image_token_encoder, f"clip of {weights[:12]}")
    else:
        features = InceptionFeatures(config.features, model.device)
    eyes = Eyes(
        features=features,
        side=config.image_size or model.config.image_size,
        clip=None if config.clip is None else Clip(config.clip, model.device),
        judge=None if config.judge is None else load_judge(BUNDLED if config.judge == "bundled" else config.judge),
    )
    return Subject(name, partial(ModelSampler, model), partial(fit_of_captions, model)), eyes


def fit_of_captions(model: Engine, images: Sequence[Image.Image], captions: Sequence[str], levels: int, seed: int) -> Any:
    """How much each caption helps the network to denoise each picture: (N, M); see :mod:`unidiffuser.scoring`."""
    options = resolve({}, model.config)
    streams = model.encode_images(list(images), 1, options, [item_generators(seed, 1)[0] for _ in images])
    texts = model.encode_texts(captions)
    with model.on_device(model.net) as net:

        def evaluated(img: Tensor, clip_img: Tensor, text: Tensor, *rest: Any, **heads: Any) -> Any:
            made = net(img.to(model.dtype), clip_img.to(model.dtype), text.to(model.dtype), *rest, **heads)
            return tuple(None if stream is None else stream.float() for stream in made)

        return network_scores(evaluated, streams, texts, levels, seed)
