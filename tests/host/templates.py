"""The workflow templates and blueprints, and small workflows that show a node in its help page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blueprint import Ready
from flow import BYPASSED, GROUP_TITLE, MUTED, RUN, Flow, Info, Node, Out

MODEL, FAST_MODEL = "emoji", "emoji (fast)"
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
LARGE = "Works with the 1 B model too: see the help (?) of **Load UniDiffuser**."
KNOWN = "The bundled model knows 240 emoji concepts in the styles noto, twemoji, flat and fluent. **Prompt Helper** lists them."
OWN = "For an image of your own, click the button in **Example Image**."
SEEDS_DIFFER = "Other seeds give other results, some of them worse."
SIDE = 256  # pixels of the bundled model's images
NEW_SUBJECT = [f"zorbi-{number}.png" for number in range(4)]  # unidiffuser/emoji/studies/lora.py draws them
HOLD = {"start": 1000, "hold": 0}
BOTH = {"image_start": 1000, "text_start": 1000, "speed_image": 1, "speed_text": 1}
AHEAD = BOTH | {"speed_text": 2}  # pairs of the bundled model match more often when the caption is denoised first


class Parts:
    """The nodes with which most workflows begin."""

    def __init__(self, info: Info, title: str, *note: str, model: str = MODEL):
        self.flow = Flow(info, title, "\n\n".join([*note, LARGE]), MODELS)
        loader = self.flow.add("UniDiffuserLoader", 0, model_name=model)
        self.model, self.clip, self.vae, self.vision, self.decoder = (loader[i] for i in range(5))

    def add(self, kind: str, column: int, mode: int = RUN, title: str = "", **inputs: Any) -> Node:
        return self.flow.add(kind, column, mode, title, **inputs)

    def picture(self, name: str, column: int = 0) -> Out:
        """An example image, with a button for another one."""
        return self.add("UniDiffuserExamplePicture", column, picture=name)[0]

    def encoded(self, picture: Out, column: int = 1, **inputs: Any) -> Node:
        """Latent, CLIP embedding and cropped pixels of an image."""
        models = {"model": self.model, "vae": self.vae, "clip_vision": self.vision}
        return self.add("UniDiffuserEncodePicture", column, image=picture, **models, **inputs)

    def described(self, picture: Out, column: int = 1, **inputs: Any) -> Node:
        """Captions of an image: the best, all candidates, their scores, and the text latent."""
        models = {"model": self.model, "vae": self.vae, "clip_vision": self.vision, "caption_decoder": self.decoder}
        return self.add("UniDiffuserCaptionPicture", column, image=picture, text_guidance=GUIDANCE, **models, **inputs)

    def path(self, task: str, column: int = 1, steps: int = 20, title: str = "", **levels: Any) -> Out:
        inputs = {f"task.{name}": value for name, value in levels.items()}
        return self.add("UniDiffuserNoisePath", column, title=title, task=task, steps=steps, **inputs)[0]

    def sampler(self, path: Out, column: int = 2, **inputs: Any) -> Node:
        guidance = {"image_guidance": GUIDANCE, "text_guidance": GUIDANCE}
        settings = {**guidance, "caption_decoder": self.decoder, **inputs}
        return self.add("UniDiffuserSampler", column, model=self.model, path=path, **settings)

    def ksampler(self, positive: Out, latent: Out, column: int = 2, **inputs: Any) -> Out:
        """The core's sampler without a negative prompt."""
        nothing = self.add("ConditioningZeroOut", column, conditioning=positive)[0]
        settings = {"steps": 20, "cfg": GUIDANCE, "sampler_name": "dpmpp_2m", "scheduler": "normal", "seed": 0, **inputs}
        given = {"model": self.model, "positive": positive, "negative": nothing, "latent_image": latent}
        return self.add("KSampler", column, **given, **settings)[0]

    def text(self, text: str | Out, column: int = 1, clip: Out | None = None, mode: int = RUN) -> Out:
        return self.add("CLIPTextEncode", column, mode, clip=clip or self.clip, text=text)[0]

    def empty(self, batch: int = 1, column: int = 1) -> Out:
        return self.add("EmptyLatentImage", column, width=SIDE, height=SIDE, batch_size=batch)[0]

    def decoded(self, latent: Out, column: int = 3, vae: Out | None = None, mode: int = RUN, collapsed: bool = False) -> Out:
        return self.add("VAEDecode", column, mode, collapsed=collapsed, samples=latent, vae=vae or self.vae)[0]

    def show(self, latent: Out, column: int = 3, vae: Out | None = None, mode: int = RUN) -> None:
        image = self.decoded(latent, column, vae, mode)
        self.add("SaveImage", column, mode, images=image, filename_prefix="UniDiffuser")

    def words(self, text: Out, column: int = 3, lines: int = 1, **inputs: Any) -> Node:
        return self.add("UniDiffuserDecodeCaption", column, lines=lines, caption_decoder=self.decoder, text=text, **inputs)

    def pairs(self, images: Out, captions: Out, column: int = 3, lines: int = 0) -> None:
        self.add("UniDiffuserShowPairs", column, lines=lines, images=images, captions=captions, filename_prefix="UniDiffuser")


def text_to_image(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Generates four images from a prompt. All nodes but the loader are ComfyUI's own: KSampler works with this model as "
        "with any other.",
        f"**Try next:** another prompt, such as *rocket, fluent* or *lion, flat*. {KNOWN}",
        f"**Also:** *cfg* 1 (off) to 6. {SEEDS_DIFFER}",
    )
    prompt = p.text("red apple, twemoji")
    p.show(p.ksampler(prompt, p.empty(4), 1, seed=SEEDS[title]), 2)
    return p.flow


def image_to_text(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Describes an image in words, with three candidates, best first. The number behind each one tells how sure the model "
        "is: 0 is certain.",
        f"**Try next:** {OWN} It is cropped to a square; *fit* has other ways. The bundled model has seen emoji only, so it "
        "calls a photograph by the emoji that looks most like it.",
        "**Also:** connect *captions* to CLIP Text Encode of any model.",
    )
    picture = p.picture("lion", 1)
    made = p.described(picture, 1, candidates=3, seed=SEEDS[title])
    p.pairs(picture, made[0], 2, 4)
    return p.flow


def joint(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Generates images together with their captions, without a prompt.",
        "The caption is denoised twice as fast as the image (*speed_text* 2 in **Noise Path**), so that more pairs match.",
        "**Try next:** drag the line in the square, or type other speeds. Change the *seed* for other pairs.",
        SEEDS_DIFFER,
    )
    made = p.sampler(p.path("joint", **AHEAD), latent_image=p.empty(4, 1), seed=SEEDS[title], lines=2)
    images = p.decoded(made[0], 2)
    p.pairs(images, p.words(made[2], 3, 4)[0], 3, 9)
    return p.flow


def image_variation(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Makes variations of an image. **Caption Picture** describes it, and its CONDITIONING output goes straight to "
        "KSampler as the prompt, so nothing is lost between the words.",
        f"**Try next:** {OWN}",
        "**Also:** connect Encode Picture to *latent_image* and lower *denoise* to 0.6 to stay closer to the image.",
        SEEDS_DIFFER,
    )
    described = p.described(p.picture("fox", 1), 1)
    made = p.ksampler(described[3], p.empty(4, 2), 2, seed=SEEDS[title])
    p.show(made, 3)
    return p.flow


def text_variation(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Makes variations of a text: the first sampler turns it into images, the second one captions these as latents, "
        "without pixels in between.",
        "**Try next:** a prompt without a style, such as *sailboat*: each caption then says what its image became.",
        "**Text to Pair** does the same in one node.",
        SEEDS_DIFFER,
    )
    text = p.text("red apple", 0)
    seed = SEEDS[title]
    painted = p.sampler(p.path("text to image", 1, **HOLD), 2, text=text, latent_image=p.empty(4, 1), seed=seed)
    images = p.decoded(painted[0], 2)
    path = p.path("image to text", 3, **HOLD)
    made = p.sampler(path, 3, latent_image=painted[0], clip_vision_output=painted[1], seed=seed)
    p.pairs(images, p.words(made[2], 2, 4)[0], 4, 9)
    return p.flow


def hires_fix(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Generates an image, enlarges its latent to twice the side, and denoises it again at *denoise* 0.3. Edges "
        "come out smoother than in an enlarged picture.",
        "**Try next:** *scale_by* 1.5, or *denoise* 0.2 (closer to the first image) to 0.35; with more, small parts vanish.",
        SEEDS_DIFFER,
    )
    prompt = p.text("strawberry, fluent")
    nothing = p.add("ConditioningZeroOut", 1, conditioning=prompt)[0]
    shared = {"model": p.model, "positive": prompt, "negative": nothing, "steps": 20, "cfg": GUIDANCE}
    shared |= {"sampler_name": "dpmpp_2m", "scheduler": "normal", "seed": SEEDS[title]}
    first = p.add("KSampler", 1, latent_image=p.empty(), **shared)[0]
    larger = p.add("LatentUpscaleBy", 2, samples=first, upscale_method="bicubic", scale_by=2.0)[0]
    second = p.add("KSampler", 2, latent_image=larger, denoise=0.3, **shared)[0]
    p.add("PreviewImage", 2, images=p.decoded(first, 2), title="First pass")
    p.show(second, 3)
    return p.flow


def inpainting(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Generates the right half of an image anew to fit the prompt. The left half stays.",
        f"**Try next:** {OWN} To paint the mask, use Load Image instead, choose *Open in Mask Editor* from its menu, and "
        "connect IMAGE and MASK to Encode Picture.",
        "**Also:** connect the mask from a *Solid Mask* of another size or place.",
        SEEDS_DIFFER,
    )
    picture = p.picture("fox")
    left = p.add("SolidMask", 1, value=0.0, width=SIDE, height=SIDE)[0]
    right = p.add("SolidMask", 1, value=1.0, width=SIDE // 2, height=SIDE)[0]
    mask = p.add("MaskComposite", 1, destination=left, source=right, x=SIDE // 2, y=0, operation="add")[0]
    encoded = p.encoded(picture, 1, mask=mask)
    text = p.text("hamster, noto", 1)
    path = p.path("text to image", 2, **HOLD)
    made = p.sampler(path, 2, text=text, latent_image=encoded[0], clip_vision_output=encoded[1], seed=SEEDS[title])
    p.show(made[0], 3)
    return p.flow


def interpolation(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Morphs one image into another, by way of their noise and their captions.",
        f"**Try next:** {OWN} Two images of similar shape and style give the smoothest morph. More *frames* for a longer one.",
        "The model passes through shapes that are nothing in particular: it knows its emoji, and little between them.",
    )
    first, second = p.picture("fox", 1), p.picture("lion", 1)
    frames = p.add("UniDiffuserInterpolate", 2, model=p.model, clip_vision=p.vision, vae=p.vae, image_a=first, image_b=second)
    p.add("SaveAnimatedWEBP", 2, images=frames[0], filename_prefix="UniDiffuser", fps=6.0)
    p.pairs(frames[0], p.words(frames[1], 3, 4)[0], 3, 14)
    return p.flow


def gibbs_chain(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Captions an image, generates an image from the caption, captions that one, and so on (blocked Gibbs sampling). The "
        "node shows every round.",
        "**Try next:** raise *rounds* to add more: finished ones are kept. Raise *hold* to 300 to let the topic drift, or set "
        "it to 0.",
        OWN,
        SEEDS_DIFFER,
    )
    encoded = p.encoded(p.picture("penguin", 1), 1)
    chain = p.add(
        "UniDiffuserGibbsChain",
        2,
        model=p.model,
        vae=p.vae,
        caption_decoder=p.decoder,
        latent_image=encoded[0],
        clip_vision_output=encoded[1],
        image_guidance=GUIDANCE,
        text_guidance=GUIDANCE,
        hold=60.0,
        seed=SEEDS[title],
        lines=8,
    )
    p.pairs(chain[0], chain[1], 3, 12)
    return p.flow


def partial_caption(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Rewrites the marked words of a text to fit an image. Here *lion* is rewritten, and *noto* stays.",
        f"**Try next:** put *noto* into *words* instead, and the style is rewritten. {OWN}",
        SEEDS_DIFFER,
    )
    encoded = p.encoded(p.picture("sunflower"), 1)
    text = p.add("UniDiffuserRewriteWords", 1, clip=p.clip, text="lion, noto", words="lion", rest=False)[0]
    path = p.path("image to text", 1, **HOLD)
    given = {"latent_image": encoded[0], "clip_vision_output": encoded[1], "text": text}
    made = p.sampler(path, 2, seed=SEEDS[title], **given)
    p.pairs(encoded[2], p.words(made[2], 3, 3, candidates=3)[0], 3)
    return p.flow


def noise_paths(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "The same seed along three paths that are drawn by hand: both together, the caption first, the image first.",
        "A path says how noisy image (x axis) and caption (y axis) are at each step, from the upper right (noise) to the lower "
        "left (clean).",
        "**Try next:** drag a point, double-click the line to add one, or choose another *task*.",
        SEEDS_DIFFER,
    )
    size = p.empty(2, 0)
    paths: dict[str, tuple[str, dict[str, Any]]] = {
        "Together": ("drawn", {"points": "1000,1000 0,0"}),
        "Caption first": ("drawn", {"points": "1000,1000 800,200 0,0"}),
        "Image first": ("drawn", {"points": "1000,1000 200,800 0,0"}),
    }
    for column, (name, (task, levels)) in enumerate(paths.items(), 1):
        made = p.sampler(p.path(task, column, title=name, **levels), column, latent_image=size, seed=SEEDS[title])
        images = p.decoded(made[0], column, collapsed=True)
        captions = p.add(
            "UniDiffuserDecodeCaption", column, collapsed=True, caption_decoder=p.decoder, text=made[2], title=f"{name}: words"
        )
        p.add("UniDiffuserShowPairs", 4, title=name, images=images, captions=captions[0], filename_prefix="UniDiffuser")
    return p.flow


def caption_then_sd15(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Captions an image as a prompt for Stable Diffusion 1.5.",
        "Put its checkpoint into models/checkpoints, right-click the group and choose *Set Group Nodes to Always*.",
        f"**Try next:** {OWN} With the 1 B model the captions describe photographs in sentences.",
    )
    words = p.described(p.picture("house", 1), 1)
    before = len(p.flow.nodes)
    p.flow.space(2, GROUP_TITLE)
    p.flow.space(3, GROUP_TITLE)
    sd = p.add("CheckpointLoaderSimple", 2, MUTED, ckpt_name=SD15["name"])
    size = p.add("EmptyLatentImage", 2, MUTED, width=512, height=512, batch_size=1)[0]
    positive, negative = p.text(words[0], 2, sd[1], MUTED), p.text("", 2, sd[1], MUTED)
    settings = {"steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "seed": 0}
    given = {"model": sd[0], "positive": positive, "negative": negative, "latent_image": size}
    painted = p.add("KSampler", 3, MUTED, **given, **settings)
    p.show(painted[0], 3, sd[2], MUTED)
    p.flow.group("Stable Diffusion 1.5: set this group to Always", p.flow.nodes[before:])
    return p.flow


def latent_to_sd15(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "The LATENT of the 1 B model is that of Stable Diffusion 1.5, which refines it here.",
        "Choose the 1 B model, set the size to 512, put the SD 1.5 checkpoint into models/checkpoints, right-click the group "
        "and choose *Set Group Nodes to Always*. Until then the pair is shown without refinement.",
        "**Try next:** *denoise* 0.3 to 0.7.",
    )
    made = p.sampler(p.path("joint", 1, **AHEAD), 2, latent_image=p.empty(1, 1), seed=SEEDS[title])
    words = p.words(made[2], 2)
    before = len(p.flow.nodes)
    p.flow.space(3, GROUP_TITLE)
    sd = p.add("CheckpointLoaderSimple", 3, BYPASSED, ckpt_name=SD15["name"])
    positive, negative = p.text(words[0], 3, sd[1], BYPASSED), p.text("", 3, sd[1], BYPASSED)
    settings = {"steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.5, "seed": 0}
    given = {"latent_image": made[0], "model": sd[0], "positive": positive, "negative": negative}
    refined = p.add("KSampler", 3, BYPASSED, **given, **settings)
    p.flow.group("Stable Diffusion 1.5: set this group to Always", p.flow.nodes[before:])
    p.pairs(p.decoded(refined[0], 4), words[0], 4, 6)
    return p.flow


def draw_as_you_type(info: Info, title: str) -> Flow:
    p = Parts(
        info,
        title,
        "Draws a new image whenever you change the prompt: choose *Run (On Change)* in the menu beside **Run**, press it, and "
        "type.",
        "*emoji (fast)* needs 2 steps and no guidance (*cfg* 1), with the sampler *lcm* and the scheduler *simple*. One step "
        "is enough for a sketch, 4 give the finest edges.",
        f"**Try next:** *rocket, fluent* or *lion, flat*. {KNOWN}",
        model=FAST_MODEL,
    )
    prompt = p.text("red apple, twemoji")
    settings = {"steps": 2, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "seed": SEEDS[title]}
    made = p.ksampler(prompt, p.empty(), 1, **settings)
    p.add("PreviewImage", 2, images=p.decoded(made, 2))
    return p.flow


def caption_step_by_step(info: Info, title: str) -> Flow:
    p = Parts(info, title)
    encoded = p.encoded(p.picture("lion"), 1)
    path = p.path("image to text", 1, **HOLD)
    made = p.sampler(path, 2, latent_image=encoded[0], clip_vision_output=encoded[1])
    p.words(made[2], 3, 3, candidates=3)
    return p.flow


def invert(info: Info, title: str) -> Flow:
    p = Parts(info, title)
    encoded = p.encoded(p.picture("fox"))
    text = p.text("fox, noto")
    given = {"latent_image": encoded[0], "clip_vision_output": encoded[1], "text": text}
    noise = p.add("UniDiffuserInvert", 2, model=p.model, **given)
    path = p.path("text to image", 1, 50, **HOLD)
    settings = {"method": "ddim", "image_guidance": 1.0, "text_guidance": 1.0}
    back = p.sampler(path, 2, text=text, latent_image=noise[0], clip_vision_output=noise[1], **settings)
    p.add("PreviewImage", 3, images=p.decoded(back[0], 3))
    return p.flow


def score(info: Info, title: str) -> Flow:
    p = Parts(info, title)
    encoded = p.encoded(p.picture("fox"))
    given = {"model": p.model, "clip": p.clip, "latent_image": encoded[0], "clip_vision_output": encoded[1]}
    ranked = p.add("UniDiffuserScoreCaptions", 2, captions="lion\nfox\nsunflower\nhouse", **given)
    p.add("PreviewAny", 3, source=ranked[0])
    return p.flow


def prompt_helper(info: Info, title: str) -> Flow:
    p = Parts(info, title)
    words = p.add("UniDiffuserPromptHelper", 1, concept="rocket", style="fluent", clip=p.clip)[0]
    given = {"model": p.model, "clip": p.clip, "vae": p.vae, "caption_decoder": p.decoder}
    guidance = {"image_guidance": GUIDANCE, "text_guidance": GUIDANCE}
    pair = p.add("UniDiffuserTextToPair", 2, lines=20, prompt=words, count=4, **guidance, **given)
    p.pairs(pair[0], pair[1], 3, 6)
    return p.flow


def train_lora(info: Info, title: str) -> Flow:
    p = Parts(info, title)
    batch, *others = [p.add("LoadImage", 1, lines=11, image=name)[0] for name in NEW_SUBJECT]
    for other in others:
        batch = p.add("ImageBatch", 2, image1=batch, image2=other)[0]
    given = {"model": p.model, "clip": p.clip, "vae": p.vae, "clip_vision": p.vision, "caption_decoder": p.decoder}
    trained = p.add("UniDiffuserTrainLora", 3, images=batch, **given)
    for slot in (3, 4):
        p.add("PreviewImage", 4, images=trained[slot])
    return p.flow


def use_lora(info: Info, title: str) -> Flow:
    p = Parts(info, title)
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


def describe_a_picture(p: Parts, image: Out) -> Ready:
    node = p.described(image)
    widgets = {name: (node, name) for name in ("fit", "candidates", "steps", "text_guidance", "seed")}
    widgets["model_name"] = (p.model.node, "model_name")
    return Ready({"caption": node[0], "candidates": node[1]}, widgets)


def vary_a_picture(p: Parts, image: Out) -> Ready:
    words, size, path = p.described(image), p.empty(4), p.path("text to image", 2, **HOLD)
    made = p.sampler(path, 3, text=words[3], latent_image=size)
    widgets = {"fit": (words, "fit"), **{name: (size.node, name) for name in ("width", "height", "batch_size")}}
    widgets |= {name: (made, name) for name in ("seed", "image_guidance")} | {"steps": (path.node, "steps")}
    widgets["model_name"] = (p.model.node, "model_name")
    return Ready({"image": p.add("VAEDecode", 4, samples=made[0], vae=p.vae)[0], "caption": words[0]}, widgets)


Build = Callable[[Info, str], Flow]
WORKFLOWS: dict[str, Build] = {  # from easy to special
    "Text to image": text_to_image,
    "Image to text": image_to_text,
    "Joint pairs": joint,
    "Image variation": image_variation,
    "Text variation": text_variation,
    "Hires fix": hires_fix,
    "Inpainting": inpainting,
    "Interpolation": interpolation,
    "Gibbs chain": gibbs_chain,
    "Partial caption rewriting": partial_caption,
    "Noise path exploration": noise_paths,
    "Caption then Stable Diffusion 1.5": caption_then_sd15,
    "Hand-over to Stable Diffusion 1.5": latent_to_sd15,
    "Draw as you type": draw_as_you_type,
}
SEEDS = dict.fromkeys(WORKFLOWS, 0) | {  # whose results show what the template is for; make_pictures.py draws these
    "Joint pairs": 58,
    "Noise path exploration": 6,
    "Hand-over to Stable Diffusion 1.5": 58,
}
HELP_FLOWS: dict[str, Build] = {
    "Caption step by step": caption_step_by_step,
    "Prompt helper": prompt_helper,
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


def stem(title: str) -> str:
    """The file name of a template: numbered in the order of the list, without spaces so that ?template= links open it."""
    return f"{list(WORKFLOWS).index(title) + 1:02d}-{title.lower().replace(' ', '-')}"
