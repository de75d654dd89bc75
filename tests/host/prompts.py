"""Builds prompts in the API's format."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]
Link = list[Any]


class Graph:
    """Builds a prompt: `graph.add("Node", input=value)` returns a function from output number to link."""

    def __init__(self, model: str = "tiny.safetensors"):
        self.prompt: Prompt = {}
        loader = self.add("UniDiffuserLoader", model_name=model)
        self.model, self.clip, self.vae, self.clip_vision, self.decoder = (loader(i) for i in range(5))

    def add(self, node: str, /, **inputs: Any) -> Any:
        name = str(len(self.prompt) + 1)
        self.prompt[name] = {"class_type": node, "inputs": inputs}
        return lambda output=0: [name, output]

    def path(self, task: str, steps: int = 3, spacing: str = "uniform", **levels: float) -> Link:
        defaults: dict[str, float] = {"start": 1000}
        if task in ("text to image", "image to text"):
            defaults["hold"] = 0
        if task == "joint":
            defaults = {"image_start": 1000, "text_start": 1000, "speed_image": 1, "speed_text": 1}
        chosen = {f"task.{name}": value for name, value in {**defaults, **levels}.items()}
        return self.add("UniDiffuserNoisePath", task=task, steps=steps, spacing=spacing, **chosen)

    def sampler(self, path: Link, seed: int = 1, model: Link | None = None, **inputs: Any) -> Any:
        settings = {"method": "dpmpp_2m", "image_guidance": 2.0, "text_guidance": 2.0, "data_type": "curated", **inputs}
        return self.add("UniDiffuserSampler", model=model or self.model, path=path, seed=seed, **settings)

    def ksampler(self, positive: Link, negative: Link, latent: Link, model: Link | None = None, **inputs: Any) -> Any:
        settings = {
            "seed": 1,
            "steps": 3,
            "cfg": 2.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "normal",
            "denoise": 1.0,
            **inputs,
        }
        return self.add(
            "KSampler", model=model or self.model, positive=positive, negative=negative, latent_image=latent, **settings
        )

    def empty(self, width: int = 128, height: int = 128, batch_size: int = 1) -> Link:
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch_size)()

    def text(self, text: str) -> Link:
        return self.add("CLIPTextEncode", clip=self.clip, text=text)()

    def picture(self, side: int = 128, red: int = 0xC03010) -> Link:
        return self.add("EmptyImage", width=side, height=side, batch_size=1, color=red)()

    def encoded(self, image: Link | None = None) -> tuple[Link, Link]:
        """(LATENT, CLIP_VISION_OUTPUT) of an image."""
        image = image or self.picture()
        return (
            self.add("VAEEncode", pixels=image, vae=self.vae)(),
            self.add("CLIPVisionEncode", clip_vision=self.clip_vision, image=image, crop="center")(),
        )

    def caption(self, text: Link, **inputs: Any) -> Any:
        settings = {"method": "beam", "candidates": 1, "beams": 3, "top_p": 0.8, "temperature": 1.0, "seed": 0, **inputs}
        return self.add("UniDiffuserDecodeCaption", caption_decoder=self.decoder, text=text, **settings)

    def score(self, captions: str, levels: int = 2, seed: int = 0) -> Any:
        """Score captions, one per line, of an example image."""
        latent, token = self.encoded()
        inputs = {"latent_image": latent, "clip_vision_output": token, "captions": captions, "levels": levels, "seed": seed}
        return self.add("UniDiffuserScoreCaptions", model=self.model, clip=self.clip, **inputs)

    def show(self, latent: Link) -> str:
        """Decode and preview a latent; returns the id of the preview node."""
        image = self.add("VAEDecode", samples=latent, vae=self.vae)()
        return self.add("PreviewImage", images=image)()[0]

    def save(self, latent: Link, name: str) -> None:
        self.add("SaveLatent", samples=latent, filename_prefix=name)
