"""The workflow templates and blueprints, and small workflows that show a node in its help page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blueprint import Ready
from flow import BYPASSED, MUTED, RUN, Flow, Info, Node, Out

MODEL = "emoji"
GUIDANCE = 3.0  # of the bundled model, see docs/model-card.md
LARGE_MODEL = {
    "name": "uvit_v1.pth",
    "url": "https://huggingface.co/thu-ml/unidiffuser-v1/resolve/main/uvit_v1.pth",
    "directory": "unidiffuser",
}
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
}
MODELS = {"UniDiffuserLoader": [LARGE_MODEL], "CheckpointLoaderSimple": [SD15]}
OWN = "For your own image, enable Load Image (Ctrl+B) and connect it instead of the example."
LARGE = "For the published 1 B model, see the help of **Load UniDiffuser**, choose its file and set all sizes to 512."
NEW_SUBJECT = [f"zorbi-{number}.png" for number in range(4)]  # unidiffuser/emoji/studies/lora.py draws them
HOLD = {"start": 1000, "hold": 0}
BOTH = {"image_start": 1000, "text_start": 1000, "speed_image": 1, "speed_text": 1}
AHEAD = BOTH | {"speed_text": 2}  # pairs of the bundled model match more often when the caption is denoised first


class Parts:
    """The nodes with which most workflows begin."""

    def __init__(self, info: Info, title: str, note: str):
        self.flow = Flow(info, title, f"{note}\n\n{LARGE}", MODELS)
        loader = self.flow.add("UniDiffuserLoader", 0, model_name=MODEL)
        self.model, self.clip, self.vae, self.vision, self.decoder = (loader[i] for i in range(5))

    def add(self, kind: str, column: int, mode: int = RUN, title: str = "", **inputs: Any) -> Node:
        return self.flow.add(kind, column, mode, title, **inputs)

    def picture(self, name: str) -> Out:
        """An example image, and beside it a bypassed Load Image for another one."""
        example = self.add("UniDiffuserExamplePicture", 0, picture=name)
        self.add("LoadImage", 0, BYPASSED, "Your own image", image="")
        if OWN not in self.flow.note:
            self.flow.note = self.flow.note.replace(LARGE, f"{OWN}\n\n{LARGE}")
        return example[0]

    def encoded(self, picture: Out) -> tuple[Out, Out]:
        """Image latent and CLIP embedding of an image, scaled to the model's size first: a photograph is far larger."""
        size = {"upscale_method": "lanczos", "width": 256, "height": 256, "crop": "center"}
        square = self.add("ImageScale", 1, image=picture, **size)[0]
        return (
            self.add("VAEEncode", 1, pixels=square, vae=self.vae)[0],
            self.add("CLIPVisionEncode", 1, clip_vision=self.vision, image=square, crop="center")[0],
        )

    def path(self, task: str, column: int = 1, steps: int = 20, title: str = "", **levels: float) -> Out:
        inputs = {f"task.{name}": value for name, value in levels.items()}
        return self.add("UniDiffuserNoisePath", column, title=title, task=task, steps=steps, **inputs)[0]

    def sampler(self, path: Out, column: int = 2, **inputs: Any) -> Node:
        guidance = {"image_guidance": GUIDANCE, "text_guidance": GUIDANCE}
        settings = {**guidance, "caption_decoder": self.decoder, **inputs}
        return self.add("UniDiffuserSampler", column, model=self.model, path=path, **settings)

    def text(self, text: str | Out, column: int = 1, clip: Out | None = None, mode: int = RUN) -> Out:
        return self.add("CLIPTextEncode", column, mode, clip=clip or self.clip, text=text)[0]

    def empty(self, batch: int = 1, column: int = 1) -> Out:
        return self.add("EmptyLatentImage", column, width=256, height=256, batch_size=batch)[0]

    def show(self, latent: Out, column: int = 3, vae: Out | None = None, mode: int = RUN) -> Out:
        image = self.add("VAEDecode", column, mode, samples=latent, vae=vae or self.vae)[0]
        self.add("SaveImage", column, mode, images=image, filename_prefix="UniDiffuser")
        return image

    def words(self, text: Out, column: int = 3, lines: int = 1, **inputs: Any) -> Node:
        return self.add("UniDiffuserDecodeCaption", column, lines=lines, caption_decoder=self.decoder, text=text, **inputs)

    def caption(self, text: Out, column: int = 3, lines: int = 1, **inputs: Any) -> Node:
        words = self.words(text, column, lines, **inputs)
        self.add("PreviewAny", column, lines=2 * lines, source=words[1])  # the host separates list items by empty lines
        return words


def text_to_image(info: Info, title: str) -> Flow:
    p = Parts(
        info, title, "Generates images from a text, with core nodes only: KSampler works with this MODEL as with any other."
    )
    prompt = p.text("red apple, twemoji")
    made = p.add(
        "KSampler",
        2,
        model=p.model,
        positive=prompt,
        negative=p.add("ConditioningZeroOut", 1, conditioning=prompt)[0],
        latent_image=p.empty(4),
        steps=20,
        cfg=GUIDANCE,
        sampler_name="dpmpp_2m",
        scheduler="normal",
        seed=0,
    )
    p.show(made[0])
    return p.flow


def image_to_text(info: Info, title: str) -> Flow:
    p = Parts(info, title, "Captions an image. The three candidates are listed best first.")
    latent, token = p.encoded(p.picture("lion"))
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    p.caption(made[2], lines=3, candidates=3)
    return p.flow


def joint(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Generates images and their captions together, without a prompt. Change the seed for other pairs. The caption is "
        "denoised twice as fast as the image, so that pairs of the small model match more often; try other speeds.",
    )
    made = p.sampler(p.path("joint", **AHEAD), latent_image=p.empty(4))
    p.show(made[0])
    p.caption(made[2], 4, 4)
    return p.flow


def image_variation(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Varies an image: it is captioned, and the text latent goes straight back to images, without words in between.",
    )
    latent, token = p.encoded(p.picture("fox"))
    described = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    made = p.sampler(p.path("text to image", 2, **HOLD), 3, text=described[2], latent_image=p.empty(4))
    p.show(made[0], 4)
    p.caption(described[2], 5)
    return p.flow


def text_variation(info: Info, title: str) -> Flow:
    p = Parts(info, title, "Varies a text: it becomes image latents, and these are captioned, without pixels in between.")
    painted = p.sampler(p.path("text to image", **HOLD), text=p.text("red apple, twemoji"), latent_image=p.empty(4))
    made = p.sampler(p.path("image to text", 2, **HOLD), 3, latent_image=painted[0], clip_vision_output=painted[1])
    p.caption(made[2], 4, 4)
    p.show(painted[0], 5)
    return p.flow


def gibbs_chain(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Captions an image, generates an image from the caption, and so on. Raise *rounds* to add more: finished ones stay.",
    )
    latent, token = p.encoded(p.picture("penguin"))
    chain = p.add(
        "UniDiffuserGibbsChain",
        2,
        model=p.model,
        vae=p.vae,
        caption_decoder=p.decoder,
        latent_image=latent,
        clip_vision_output=token,
        image_guidance=GUIDANCE,
        text_guidance=GUIDANCE,
        hold=60.0,
        lines=4,
    )
    p.add("SaveImage", 3, images=chain[0], filename_prefix="UniDiffuser")
    p.add("PreviewAny", 3, lines=4, source=chain[1])
    return p.flow


def interpolation(info: Info, title: str) -> Flow:
    p = Parts(info, title, "Morphs one image into another, by their noise and captions.")
    first = p.picture("fox")
    second = p.add("UniDiffuserExamplePicture", 0, picture="sunflower")[0]
    frames = p.add("UniDiffuserInterpolate", 1, model=p.model, clip_vision=p.vision, vae=p.vae, image_a=first, image_b=second)
    p.add("SaveAnimatedWEBP", 2, images=frames[0], filename_prefix="UniDiffuser", fps=6.0)
    p.add("PreviewImage", 2, images=frames[0])
    p.caption(frames[1], 3, 8)
    return p.flow


def inpainting(info: Info, title: str) -> Flow:
    p = Parts(info, title, "Replaces the right half of an image to fit the text. You can also paint a mask in Load Image.")
    latent, token = p.encoded(p.picture("fox"))
    left = p.add("SolidMask", 1, value=0.0, width=256, height=256)[0]
    right = p.add("SolidMask", 1, value=1.0, width=128, height=256)[0]
    mask = p.add("MaskComposite", 2, destination=left, source=right, x=64, y=0, operation="add")[0]
    masked = p.add("SetLatentNoiseMask", 2, samples=latent, mask=mask)[0]
    path = p.path("text to image", 2, **HOLD)
    made = p.sampler(path, 3, text=p.text("lion, noto"), latent_image=masked, clip_vision_output=token)
    p.show(made[0], 4)
    return p.flow


def partial_caption(info: Info, title: str) -> Flow:
    p = Parts(info, title, "Rewrites the marked words of a text to fit an image; the others stay.")
    latent, token = p.encoded(p.picture("sunflower"))
    text = p.add("UniDiffuserRewriteWords", 1, clip=p.clip, text="lion, noto", words="lion", rest=False)[0]
    made = p.sampler(p.path("image to text", 1, **HOLD), latent_image=latent, clip_vision_output=token, text=text)
    p.caption(made[2], lines=3, candidates=3)
    return p.flow


def noise_paths(info: Info, title: str) -> Flow:
    p = Parts(info, title, "The same seed along three paths: both together, caption first, image first.")
    size = p.empty(2, 0)
    paths = {
        "Together": BOTH,
        "Caption first": BOTH | {"speed_text": 3},
        "Image first": BOTH | {"speed_image": 3},
    }
    for name, levels in paths.items():
        made = p.sampler(p.path("joint", 1, title=name, **levels), 2, latent_image=size, seed=5)
        p.show(made[0], 3)
        p.words(made[2], 4, 2)
        p.flow.row()
    return p.flow


def caption_then_sd15(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Captions an image as a prompt for Stable Diffusion 1.5. Put its checkpoint into models/checkpoints, "
        "right-click the group and choose *Set Group Nodes to Always*.",
    )
    latent, token = p.encoded(p.picture("house"))
    made = p.sampler(p.path("image to text", **HOLD), latent_image=latent, clip_vision_output=token)
    words = p.caption(made[2])
    before = len(p.flow.nodes)
    sd = p.add("CheckpointLoaderSimple", 4, MUTED, ckpt_name=SD15["name"])
    size = p.add("EmptyLatentImage", 4, MUTED, width=512, height=512, batch_size=1)[0]
    painted = p.add(
        "KSampler",
        5,
        MUTED,
        model=sd[0],
        positive=p.text(words[0], 4, sd[1], MUTED),
        negative=p.text("", 4, sd[1], MUTED),
        latent_image=size,
        steps=20,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        seed=0,
    )
    p.show(painted[0], 5, sd[2], MUTED)
    p.flow.group("Stable Diffusion 1.5: set this group to Always", p.flow.nodes[before:])
    return p.flow


def latent_to_sd15(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "The LATENT of the 1 B model is that of Stable Diffusion 1.5, which refines it here. Choose the 1 B model, put the SD "
        "1.5 checkpoint into models/checkpoints, right-click the group and choose *Set Group Nodes to Always*.",
    )
    made = p.sampler(p.path("joint", **BOTH), latent_image=p.empty(1))
    words = p.caption(made[2])
    before = len(p.flow.nodes)
    sd = p.add("CheckpointLoaderSimple", 4, BYPASSED, ckpt_name=SD15["name"])
    refined = p.add(
        "KSampler",
        5,
        BYPASSED,
        latent_image=made[0],
        model=sd[0],
        positive=p.text(words[0], 4, sd[1], BYPASSED),
        negative=p.text("", 4, sd[1], BYPASSED),
        steps=20,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=0.5,
        seed=0,
    )
    p.flow.group("Stable Diffusion 1.5: set this group to Always", p.flow.nodes[before:])
    p.show(refined[0], 6)
    return p.flow


def invert(info: Info, title: str) -> Flow:
    p = Parts(info, title, "")
    latent, token = p.encoded(p.picture("fox"))
    text = p.text("fox, noto")
    noise = p.add("UniDiffuserInvert", 2, model=p.model, latent_image=latent, clip_vision_output=token, text=text)
    path = p.path("text to image", 2, 50, **HOLD)
    settings = {"method": "ddim", "image_guidance": 1.0, "text_guidance": 1.0}
    back = p.sampler(path, 3, text=text, latent_image=noise[0], clip_vision_output=noise[1], **settings)
    p.add("PreviewImage", 4, images=p.add("VAEDecode", 4, samples=back[0], vae=p.vae)[0])
    return p.flow


def score(info: Info, title: str) -> Flow:
    p = Parts(info, title, "")
    latent, token = p.encoded(p.picture("fox"))
    given = {"model": p.model, "clip": p.clip, "latent_image": latent, "clip_vision_output": token}
    ranked = p.add("UniDiffuserScoreCaptions", 2, captions="lion\nfox\nsunflower\nhouse", **given)
    p.add("PreviewAny", 3, source=ranked[0])
    return p.flow


def train_lora(info: Info, title: str) -> Flow:
    p = Parts(info, title, "")
    batch, *others = [p.add("LoadImage", 1, lines=11, image=name)[0] for name in NEW_SUBJECT]
    for other in others:
        batch = p.add("ImageBatch", 2, image1=batch, image2=other)[0]
    given = {"model": p.model, "clip": p.clip, "vae": p.vae, "clip_vision": p.vision, "caption_decoder": p.decoder}
    trained = p.add("UniDiffuserTrainLora", 3, images=batch, **given)
    for slot in (3, 4):
        p.add("PreviewImage", 4, images=trained[slot])
    return p.flow


def use_lora(info: Info, title: str) -> Flow:
    p = Parts(info, title, "")
    loaded = p.add("UniDiffuserLoraLoader", 1, model=p.model, caption_decoder=p.decoder, lora_name="zorbi.safetensors")
    path, given = p.path("text to image", **HOLD), {"text": p.text("zorbi"), "latent_image": p.empty(4)}
    guidance = {"image_guidance": GUIDANCE, "text_guidance": GUIDANCE}
    made = p.add("UniDiffuserSampler", 2, model=loaded[0], path=path, seed=1, **guidance, **given)
    p.add("PreviewImage", 3, images=p.add("VAEDecode", 3, samples=made[0], vae=p.vae)[0])
    return p.flow


def draw_a_text(p: Parts) -> Ready:
    prompt, size = p.text("red apple, twemoji"), p.empty(4)
    nothing = p.add("ConditioningZeroOut", 2, conditioning=prompt)[0]
    given = {"model": p.model, "positive": prompt, "negative": nothing, "latent_image": size}
    settings = {"steps": 20, "cfg": GUIDANCE, "sampler_name": "dpmpp_2m", "scheduler": "normal", "seed": 0}
    made = p.add("KSampler", 3, **given, **settings)
    widgets = {"prompt": (prompt.node, "text"), **{name: (size.node, name) for name in ("width", "height", "batch_size")}}
    widgets |= {name: (made, name) for name in ("seed", "steps", "cfg")} | {"model_name": (p.model.node, "model_name")}
    return Ready({"image": p.add("VAEDecode", 4, samples=made[0], vae=p.vae)[0]}, widgets)


def described(p: Parts, image: Out) -> Node:
    given = {"model": p.model, "vae": p.vae, "clip_vision": p.vision, "caption_decoder": p.decoder}
    return p.add("UniDiffuserCaptionPicture", 1, image=image, text_guidance=GUIDANCE, **given)


def describe_a_picture(p: Parts, image: Out) -> Ready:
    node = described(p, image)
    widgets = {name: (node, name) for name in ("fit", "candidates", "steps", "text_guidance", "seed")}
    widgets["model_name"] = (p.model.node, "model_name")
    return Ready({"caption": node[0], "candidates": node[1]}, widgets)


def vary_a_picture(p: Parts, image: Out) -> Ready:
    words, size, path = described(p, image), p.empty(4), p.path("text to image", 2, **HOLD)
    made = p.sampler(path, 3, text=words[3], latent_image=size)
    widgets = {"fit": (words, "fit"), **{name: (size.node, name) for name in ("width", "height", "batch_size")}}
    widgets |= {name: (made, name) for name in ("seed", "image_guidance")} | {"steps": (path.node, "steps")}
    widgets["model_name"] = (p.model.node, "model_name")
    return Ready({"image": p.add("VAEDecode", 4, samples=made[0], vae=p.vae)[0], "caption": words[0]}, widgets)


Build = Callable[[Info, str], Flow]
WORKFLOWS: dict[str, Build] = {
    "Text to image": text_to_image,
    "Image to text": image_to_text,
    "Joint pairs": joint,
    "Image variation": image_variation,
    "Text variation": text_variation,
    "Gibbs chain": gibbs_chain,
    "Interpolation": interpolation,
    "Inpainting": inpainting,
    "Partial caption rewriting": partial_caption,
    "Noise path exploration": noise_paths,
    "Caption then Stable Diffusion 1.5": caption_then_sd15,
    "Hand-over to Stable Diffusion 1.5": latent_to_sd15,
}
HELP_FLOWS: dict[str, Build] = {
    "Invert": invert,
    "Score captions": score,
    "Train a LoRA": train_lora,
    "Use a LoRA": use_lora,  # trained by the workflow before
}
BLUEPRINTS: dict[str, Callable[..., Ready]] = {  # each takes the parts, and the image if it is about one
    "UniDiffuser - Text to image": draw_a_text,
    "UniDiffuser - Describe a picture": describe_a_picture,
    "UniDiffuser - Vary a picture": vary_a_picture,
}
WITHOUT_IMAGE = {"UniDiffuser - Text to image"}
