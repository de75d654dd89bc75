"""From sampled streams to the outputs of a node."""

from __future__ import annotations

from typing import Any

import comfy.clip_vision
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..unidiffuser.path import LEAST, NoisePath
from ..unidiffuser.streams import MODALITIES, Streams
from .stream_inputs import KEPT, LEVEL, SCALE, TOKEN_MASK


def host_outputs(
    model: Any,
    out: Streams,
    path: NoisePath,
    latent_image: dict[str, Any] | None = None,
    given: Streams | None = None,
    mask: Streams | None = None,
) -> io.NodeOutput:
    """LATENT, CLIP_VISION_OUTPUT and CONDITIONING of sampled streams.

    A stream that the path does not sample becomes an ExecutionBlocker, which skips the nodes behind it. One that the path
    leaves noisy carries its LEVEL, and under a `mask` the `given` clean values, so that another path can continue.
    """
    given, mask = given or Streams(), mask or Streams()
    level = {name: {LEVEL: path.labels(name)[-1]} if path.labels(name)[-1] > LEAST else {} for name in MODALITIES}
    latent = vision = cond = ExecutionBlocker(None)
    if out.img is not None:
        latent = {k: v for k, v in (latent_image or {}).items() if k not in (LEVEL, KEPT, SCALE)}
        latent |= {"samples": model.model.process_latent_out(out.img), **level["img"]}
        if level["img"] and mask.img is not None:
            latent[KEPT] = model.model.process_latent_out(given.need("img"))
    if out.clip_img is not None:
        vision = comfy.clip_vision.Output()
        for name, value in {"image_embeds": out.clip_img[:, 0], **level["img"]}.items():
            vision[name] = value
    if out.text is not None:
        kept = {TOKEN_MASK: mask.text, KEPT: given.text} if level["text"] and mask.text is not None else {}
        cond = [[out.text, level["text"] | kept]]
    return io.NodeOutput(latent, vision, cond)
