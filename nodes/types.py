"""What the nodes share towards the front end, and the two socket types of this pack.

Everything else travels in the host's own types.

UNIDIFFUSER_CAPTION_DECODER: a `host_parts.HostCaptionDecoder`.
UNIDIFFUSER_NOISE_PATH: a `unidiffuser.path.NoisePath`, steps + 1 labels (t_img, t_text) in 0..1000.

A text latent travels as CONDITIONING whose tensor is (B, L, text_dim), 77 x 64 in the published models; it goes straight
into a KSampler of this pack's MODEL, the UniDiffuser Sampler and Decode Caption. A CLIP image token travels as
CLIP_VISION_OUTPUT with `image_embeds` (B, clip_img_dim).
"""

from __future__ import annotations

from comfy_api.latest import io
from server import PromptServer

CaptionDecoderType = io.Custom("UNIDIFFUSER_CAPTION_DECODER")
NoisePathType = io.Custom("UNIDIFFUSER_NOISE_PATH")

CATEGORY = "UniDiffuser"


def show_text(text: str, node_id: str) -> None:
    """Show a text in a node, which keeps it until the node runs again."""
    PromptServer.instance.send_progress_text(text, node_id)
