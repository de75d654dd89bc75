"""The category and the two socket types of this pack; everything else uses the host's own types.

UNIDIFFUSER_CAPTION_DECODER: a `host_captions.HostCaptionDecoder`.
UNIDIFFUSER_NOISE_PATH: a `unidiffuser.path.NoisePath`, steps + 1 labels (t_img, t_text) in 0..1000.

A text latent is a CONDITIONING whose tensor is (B, L, text_dim), 77 x 64 in the published models; KSampler with this pack's
MODEL, UniDiffuser Sampler and Decode Caption accept it. A CLIP image token is a CLIP_VISION_OUTPUT with `image_embeds`
(B, clip_img_dim).
"""

from __future__ import annotations

from comfy_api.latest import io
from server import PromptServer

CaptionDecoderType = io.Custom("UNIDIFFUSER_CAPTION_DECODER")
NoisePathType = io.Custom("UNIDIFFUSER_NOISE_PATH")

CATEGORY = "UniDiffuser"


def show_text(text: str, node_id: str) -> None:
    """Show a text in a node until the node runs again."""
    PromptServer.instance.send_progress_text(text, node_id)
