"""Stage 4: the U-ViT. From scratch where the checkpoint holds only encoders, else a fine-tuning of its network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..distributed import own_device
from ..schedule import NUM_LABELS
from ..small.network import build, config_of, predicts_noise
from ..streams import MODALITY_OF, Streams
from ..training.augment import shifted
from ..training.config import TrainConfig
from ..training.network import attention_for, example_cost, export_model, prompt_grid
from ..training.objective import PAPER, diffusion_loss, draw_labels, noise_of_another
from ..training.stage import Batch, ExampleCost, TrainingStage, generator_on, seeded_init
from ..uvit import Block, UViT, UViTConfig
from .image_folder import training_set
from .latents import Latents
from .transplant import transplanted


class Kin:
    """Rows that share a value: for a row, another one (or itself) with the same, by chance."""

    def __init__(self, values: Sequence[Any]):
        names = list(dict.fromkeys(values))
        kinds = torch.tensor([names.index(value) for value in values])
        self.kinds = kinds
        self.counts = torch.bincount(kinds)
        self.starts = self.counts.cumsum(0) - self.counts
        self.rows = kinds.argsort(stable=True)  # those of the first kind, then those of the second ...
        self.places = self.rows.argsort()  # where each row is among them

    def to(self, device: torch.device) -> Kin:
        """Itself, on the device."""
        for name in ("kinds", "counts", "starts", "rows", "places"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (B,) of the same kinds as the rows ``index`` (B,); all on one device."""
        kinds = self.kinds[index]
        device, counts = generator.device, self.counts[kinds]
        wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no doubles; floats may round up
        chance = torch.rand(index.shape, generator=generator, dtype=wide, device=device)
        place = torch.minimum((chance * counts).long(), counts - 1)
        return self.rows[self.starts[kinds] + place]

    def another(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (B,) of the same kinds as the rows ``index`` (B,), but never these themselves unless they are the only ones."""
        kinds = self.kinds[index]
        starts, others = self.starts[kinds], self.counts[kinds] - 1
        chance = torch.rand(index.shape, generator=generator, device=generator.device)
        further = 1 + torch.minimum((chance * others).long(), (others - 1).clamp_min(0))
        return self.rows[starts + (self.places[index] - starts + further) % (others + 1)]


def _chosen(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Items (B, ...) of the one where the condition (B,) holds, else of the other."""
    return torch.where(condition.view(-1, *[1] * (yes.ndim - 1)), yes, no)


class UViTStage(TrainingStage):
    """Options:

    data, where, image_size: the image folder, a record filter, the side in pixels.
    checkpoint: a model, or its encoders alone (`unidiffuser train assemble`), in any layout.
    uvit: sizes of a new network (fields of UViTConfig), for a checkpoint that has none.
    network_of: a model whose network goes on learning on the latents of ``checkpoint``, whose own is left behind: other
        encoders of the same shapes. Where `uvit` says so ("img_size", "in_chans", "patch_size"), the image latents may be of
        other shapes, and its image head another one ("sigma_data", "detail_width" ...): what reads and writes them then begins
        anew, see :func:`.growth.transplanted`.
    mix, lean, logit_normal: which labels are seen how often, see :func:`.objective.draw_labels`; the paper's objective
        when absent.
    weights: how many times a stream counts in the loss, see :func:`.objective.diffusion_loss`; all the same when absent.
    captioning: what the share "clean_image" of the mix learns from instead: "where" (a filter of its own), "versions" (copies
        of each picture, all but the first changed by :func:`.augment.augmented`), and its "place", "colour", "mirror" ...
        Captions then become those of more pictures than the network draws; nothing changes for what it draws. "swap" is the
        share of these pairs whose image latent is that of another picture with the same value of the field "swap_within":
        then only the CLIP token tells the rest of the caption. A small set is soon known by heart from its latents, and a
        network that reads them names no picture that it has not seen, though its token says what it shows. It has
        "caption_shares" of its own, where it shall say more or less than the other shares.
    drawing: what a share of "clean_text" learns from instead: "where", and "share". More things in the same styles show the
        network what makes a style, whatever is drawn in it. It may have "caption_shares" of its own. "repaint" is the share
        of these pairs, at labels from "repaint_from" on, whose noisy picture is that of another picture with the same value of
        the field "repaint_within", see :func:`.objective.noise_of_another`: the same thing in another style, say. A
        small network remembers one picture of a thing and begins it whatever style it is asked for; so it learns to leave it.
        "versions" and the strengths of :func:`.augment.augmented` as for captioning, but only at labels below
        "changed_below" (all when absent), and not where the noisy picture is another one: there the noise hides little of how
        it was changed, and who has seen a picture moved in many ways takes the noise from pictures rather than remembering
        them; above it the network draws them as they are. "share_below" is the share at these labels, the same when absent,
        and "shift" by how many cells of the latent, two at a time, they are moved at most: it costs no sharpness and no memory.
        "borrow" is the share of these pictures that are set aside for good, the same ones in every run of a seed: their
        captions are shown with another picture of the same value of the field "repaint_within" in their place, in the code of
        their manner where the autoencoder has a palette. A network that knows one picture for every caption says for others a
        mean of those that it knows; under captions like these it learns to choose one. "mixed_shares" are the caption_shares
        of the pairs in which another picture has a part by "repaint" or "borrow". They should leave out captions that do not
        say which of the two is meant: under these a network that has begun one picture would learn to leave it for any other,
        and draws a mixture of all of them.
    manner_of: field of the records that names the manner of an autoencoder with a palette, see :class:`.latents.Latents`.
    caption_shares: probability of each caption form of a picture; equal when absent.
    defaults: "steps" and "guidance" that the exported file suggests.
    dtype: of the exported file, "float16" when absent.
    sample_prompts: captions of the sample grid, multiples of 8.
    """

    blocks = (Block,)
    model: UViT

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.checkpoint: Checkpoint = load_checkpoint(options["checkpoint"])
        start = self._start(options)
        sizes = self._sizes(options, start)
        images = training_set(options)
        self.size = len(images)
        self.latents = Latents(self.checkpoint, images, device=own_device(), manner_of=options.get("manner_of"))
        self.mix, self.lean = options.get("mix", PAPER), float(options.get("lean", 0.0))
        self.logit_normal: list[float] | None = options.get("logit_normal")
        self.velocity = not predicts_noise(sizes)
        self.weights = options.get("weights") or {}
        if wrong := [name for name, weight in self.weights.items() if name not in MODALITY_OF or not weight >= 0]:
            raise ValueError(f"weights has {wrong[0]}; it may have {', '.join(MODALITY_OF)}, each 0 or more")
        captioning, drawing = options.get("captioning") or {}, options.get("drawing") or {}
        self.swap, within = float(captioning.get("swap", 0.0)), captioning.get("swap_within", "style")
        self.drawing_share = float(drawing.get("share", 1.0))
        self.captioning = self._others("captioning", options, {"swap", "swap_within", "caption_shares"})
        self.drawing = self._others(
            "drawing",
            options,
            {"share", "share_below", "shift", "caption_shares", "repaint", "repaint_within", "repaint_from", "changed_below"}
            | {"borrow", "mixed_shares"},
        )
        self.changed_below = int(drawing.get("changed_below", NUM_LABELS + 1))
        self.share_below, self.shift = float(drawing.get("share_below", self.drawing_share)), int(drawing.get("shift", 0))
        self.repaint, self.repaint_from = float(drawing.get("repaint", 0.0)), int(drawing.get("repaint_from", 1))
        if self.swap and self.captioning is not None:
            self.kin = Kin([record.get(within) for record in self.captioning.records])
        self.aside: Tensor | None = None
        borrow = float(drawing.get("borrow", 0.0))
        if self.drawing is not None and (self.repaint or borrow):
            self.painted = Kin([record.get(drawing.get("repaint_within", "label")) for record in self.drawing.records])
        if self.drawing is not None and borrow:
            by_chance = torch.rand(len(self.painted.kinds), generator=torch.Generator().manual_seed(config.seed)) < borrow
            self.aside = by_chance & (self.painted.counts[self.painted.kinds] > 1)
        self.dtype = getattr(torch, options.get("dtype", "float16"))
        self.defaults = options.get("defaults", self.checkpoint.config.defaults)
        self.shares = self._shares(options.get("caption_shares"), "caption_shares")
        self.said, self.drawn_as = (
            self._shares(given.get("caption_shares", self.shares.tolist()), f"caption_shares of {name}")
            for given, name in ((captioning, "captioning"), (drawing, "drawing"))
        )
        self.mixed_as = self._shares(drawing.get("mixed_shares", self.drawn_as.tolist()), "mixed_shares of drawing")
        with seeded_init(config.seed):
            self.model = build(sizes, attention=attention_for(sizes))
        if start is not None:
            weights = start.state_dict("uvit", dtype=torch.float32)
            if sizes != start.config.uvit:
                weights = transplanted(weights, start.config.uvit, self.model)
            self.model.load_state_dict(weights)
        self.prompts: list[str] = options.get("sample_prompts", [])

    def _start(self, options: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint whose network goes on learning; None where a new one begins."""
        if "network_of" not in options:
            return self.checkpoint if "uvit" in self.checkpoint.parts() else None
        return load_checkpoint(options["network_of"])

    def _sizes(self, options: dict[str, Any], start: Checkpoint | None) -> UViTConfig:
        """Those of the network: given, or of the one that goes on, with what `uvit` says of other image latents."""
        if start is None:
            return config_of(options["uvit"])
        if start is self.checkpoint:
            return start.config.uvit
        ours, theirs = self.checkpoint.config.uvit, config_of(vars(start.config.uvit) | options.get("uvit", {}))
        for name in ("img_size", "in_chans", "text_dim", "num_text_tokens", "clip_img_dim"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"the encoders of {options['checkpoint']} give {name} {getattr(ours, name)}, the network of "
                    f"{options['network_of']} takes {getattr(theirs, name)}"
                )
        return theirs

    def _shares(self, given: list[float] | None, name: str) -> Tensor:
        forms = self.latents.captions.shape[1]
        shares = torch.tensor([1.0] * forms if given is None else [float(share) for share in given])
        if len(shares) != forms:
            raise ValueError(f"{name} has {len(shares)} entries, but the pictures have {forms} captions each")
        return shares

    def _others(self, name: str, options: dict[str, Any], ours: set[str]) -> Latents | None:
        """The latents of other pictures than those of ``where``, as the options under this name say, but for `ours`."""
        if not options.get(name):
            return None
        chosen = {key: value for key, value in options[name].items() if key not in ours}
        where, versions = chosen.pop("where", options.get("where", {})), chosen.pop("versions", 1)
        images = training_set(options | {"where": where})
        settings: dict[str, Any] = {"device": own_device(), "manner_of": options.get("manner_of")}
        latents = Latents(self.checkpoint, images, versions=versions, strength=chosen, **settings)
        if latents.captions.shape[1] != self.latents.captions.shape[1]:
            raise ValueError(f"the pictures of `{name}` must have as many captions each as the others")
        return latents

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"index": indices}

    def cost(self) -> ExampleCost:
        return example_cost(self.model.config)

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        index = batch["index"]
        generator, count = generator_on(index.device, generator), len(index)

        def chance() -> Tensor:
            return torch.rand(count, generator=generator, device=index.device)

        self.shares, self.said, self.drawn_as, self.mixed_as = (
            x.to(index.device) for x in (self.shares, self.said, self.drawn_as, self.mixed_as)
        )
        labels = draw_labels(count, self.mix, generator, self.lean, self.logit_normal)
        clean = self.latents.to(index.device).draw(index, self.shares, generator)
        if self.captioning is not None:
            others = self._any_of(self.captioning, count, generator)
            shown = self.captioning.draw(others, self.said, generator)
            if self.swap:
                swapped = chance() < self.swap
                kin = self.captioning.draw(self.kin.to(index.device).draw(others, generator), self.said, generator)
                shown = shown.replace(img=_chosen(swapped, kin.need("img"), shown.need("img")))
            clean = clean.zip(shown, lambda own, other: _chosen(labels["img"] == 0, other, own))
        if self.drawing is not None:
            others = self._any_of(self.drawing, count, generator)
            below = labels["img"] < self.changed_below
            drawn = (labels["text"] == 0) & (chance() < torch.where(below, self.share_below, self.drawing_share))
            painted = torch.zeros_like(drawn)
            if self.repaint:
                painted = (chance() < self.repaint) & drawn & (labels["img"] >= self.repaint_from)
            changed = below & ~painted
            mixed = painted
            if self.aside is not None:
                self.aside = self.aside.to(index.device)
                mixed = painted | self.aside[others]
            shares = torch.where(mixed[:, None], self.mixed_as, self.drawn_as)
            made = self.drawing.draw(others, shares, generator, changed)
            if self.aside is not None:
                made = self._borrowed(made, others, changed, generator)
            if self.shift:
                bare = self.drawing.in_manner(made.need("img"), None)  # else the code would be wrong where a border is repeated
                moved = self.drawing.in_manner(shifted(bare, self.shift, generator), others)
                made = made.replace(img=_chosen(changed, moved, made.need("img")))
            clean = clean.zip(made, lambda own, other: _chosen(drawn, other, own))
        noise = clean.map(lambda x: torch.randn(x.shape, generator=generator, device=index.device))
        if self.drawing is not None and self.repaint:
            begun = self.drawing.draw(self.painted.to(index.device).draw(others, generator), self.drawn_as, generator, changed)
            towards = noise_of_another(clean, begun, noise, labels)
            noise = noise.replace(
                **{name: _chosen(painted, towards.need(name), noise.need(name)) for name in ("img", "clip_img")}
            )
        settings: dict[str, Any] = {"velocity": self.velocity, "weights": self.weights}
        return diffusion_loss(model, clean, generator, labels=labels, noise=noise, **settings)

    def _borrowed(self, made: Streams, others: Tensor, changed: Tensor, generator: torch.Generator) -> Streams:
        """The pairs ``made`` of the pictures ``others`` (B,), those that are set aside with another one's picture."""
        assert self.drawing is not None
        assert self.aside is not None
        kin = self.painted.to(others.device).another(others, generator)
        lent = self.drawing.draw(kin, self.drawn_as, generator, changed)
        img = self.drawing.in_manner(lent.need("img"), others)
        aside = self.aside[others]
        return made.replace(
            img=_chosen(aside, img, made.need("img")), clip_img=_chosen(aside, lent.need("clip_img"), made.need("clip_img"))
        )

    @staticmethod
    def _any_of(latents: Latents, count: int, generator: torch.Generator) -> Tensor:
        """Rows (count,) of other pictures, which are now on the generator's device."""
        latents.to(generator.device)
        return torch.randint(len(latents.captions), (count,), generator=generator, device=generator.device)

    def sample(self, model: Any) -> Image.Image | None:
        """Pictures of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        if not self.prompts:
            return None
        return prompt_grid(model, self.prompts, self.latents.encode_text, self.latents.autoencoder)

    def export(self, model: Any) -> None:
        """``model.safetensors``: the checkpoint with this network, complete in one file."""
        export_model(self.checkpoint, model, self.out / "model.safetensors", self.dtype, self.defaults)
