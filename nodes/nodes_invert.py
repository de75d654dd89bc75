"""UniDiffuser Invert: DDIM inversion of an image. UniDiffuser Interpolate: a morph between two inverted images."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..unidiffuser.path import MARGINAL, NoisePath
from ..unidiffuser.streams import Streams
from .prompt_notes import show_prompt_warning
from .run_on_host import sample_streams, shifted, watcher
from .shared_inputs import guidance_input, seed_input, steps_input
from .stream_inputs import given_streams, require_model
from .stream_outputs import host_outputs
from .types import CATEGORY

INVERSE, FORWARD = "ddim_inverse", "ddim"  # deterministic, each the inverse of the other


class Invert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserInvert",
            display_name="UniDiffuser Invert",
            category=CATEGORY,
            description="Finds the noise from which the model would generate an image. A UniDiffuser Sampler with method ddim "
            "and image_guidance 1 turns it back into the image, or into an edit of it if you change the text.",
            search_aliases=["inversion", "ddim inversion", "unsample", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser."),
                io.Latent.Input("latent_image", tooltip="The image, from VAE Encode."),
                io.ClipVisionOutput.Input("clip_vision_output", tooltip="CLIP Vision Encode of the same image."),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="A caption of the image. Without it, choose the task 'image' on the "
                    "Noise Path that samples it back.",
                ),
                steps_input("50 is usual. More steps restore the image more exactly.", default=50),
                seed_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The noise, for latent_image of a UniDiffuser Sampler."),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="The noise of its CLIP image embedding."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, latent_image: Any, clip_vision_output: Any, steps: int, seed: int, text: Any = None
    ) -> io.NodeOutput:
        given, mask = given_streams(model, latent_image, clip_vision_output, text)
        show_prompt_warning(model, text)
        path = NoisePath.image(steps) if text is None else NoisePath.text_to_image(steps)
        watch = watcher(model, steps)
        noise = sample_streams(model, path.reversed(), given, Streams(), seed, method=INVERSE, callback=watch)
        outputs = host_outputs(model, noise, path.reversed(), latent_image, given, mask)
        return io.NodeOutput(outputs[0], outputs[1])


class Interpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserInterpolate",
            display_name="UniDiffuser Interpolate",
            category=CATEGORY,
            description="Morphs one image into another. Both are captioned and inverted to noise; the frames are generated "
            "from blends of the two. Connect the frames to Create Video.",
            search_aliases=["morph", "slerp", "blend", "animation", "inbetween"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser."),
                io.ClipVision.Input("clip_vision", tooltip="From Load UniDiffuser."),
                io.Vae.Input("vae", tooltip="From Load UniDiffuser."),
                io.Image.Input("image_a", tooltip="The first frame. Its centre square is used."),
                io.Image.Input("image_b", tooltip="The last frame. Its centre square is used."),
                io.Int.Input(
                    "frames", default=8, min=2, max=1000, tooltip="Number of frames, including both images. Try 8 to 24."
                ),
                steps_input("Sampling steps for each of three passes: caption, invert, generate. 50 is usual.", default=50),
                guidance_input("text_guidance", "each caption follows its image"),
                seed_input(),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="The frames, as a batch."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The text of each frame, for Decode Caption."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip_vision: Any,
        vae: Any,
        image_a: Tensor,
        image_b: Tensor,
        frames: int,
        steps: int,
        text_guidance: float,
        seed: int,
    ) -> io.NodeOutput:
        from ..unidiffuser.pipeline import between

        pictures = torch.cat([centre_square(model, image) for image in (image_a[:1], image_b[:1])])
        clean, _ = given_streams(model, {"samples": vae.encode(pictures)}, clip_vision.encode_image(pictures), None)
        watch = watcher(model, 3 * steps)

        def run(number: int, path: NoisePath, streams: Streams, method: str, **settings: Any) -> Streams:
            return sample_streams(
                model,
                path,
                streams,
                Streams(),
                seed,
                method=method,
                **settings,
                callback=shifted(watch, number * steps, 3 * steps),
            )

        captioned = run(0, NoisePath.image_to_text(steps), clean, "dpmpp_2m", guidance=text_guidance)
        noise = run(1, NoisePath.text_to_image(steps).reversed(), captioned, INVERSE)
        sampled = run(
            2, NoisePath.text_to_image(steps), between(noise, frames), FORWARD, levels={"img": MARGINAL, "clip_img": MARGINAL}
        )
        return io.NodeOutput(vae.decode(model.model.process_latent_out(sampled.img)), [[sampled.text, {}]])


def centre_square(model: Any, image: Tensor) -> Tensor:
    """The centre square of an IMAGE (B, H, W, 3) at the size the model was trained for."""
    side = require_model(model).origin.config.image_size
    return comfy.utils.common_upscale(image[..., :3].movedim(-1, 1), side, side, "lanczos", "center").movedim(1, -1)


NODES = [Invert, Interpolate]
