"""Settings of the network's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import Training, Where
from .settings import within


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the network; those of its latents follow from the encoders. See `unidiffuser.small.network`.

    Attributes:
        detail_cond: size of the conditioning vector of the detail head (`detail_told` in checkpoints).
    """

    patch_size: int = within(1)
    embed_dim: int = within(1)
    depth: int = within(1)
    num_heads: int = within(1)
    sigma_data: float | None = within(0, default=None)
    detail_width: int = within(0, default=0)
    detail_inner: int = within(0, default=0)
    detail_cond: int = within(0, default=0)

    def fields(self) -> dict[str, Any]:
        """The fields of the network's config that these are."""
        values = dict(vars(self))
        values["detail_told"] = values.pop("detail_cond")
        return values


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Fraction of a batch for each region of noise levels, see `unidiffuser.training.objective.draw_labels`."""

    independent: float = within(0, default=0.0)
    clean_text: float = within(0, default=0.0)
    clean_image: float = within(0, default=0.0)
    equal: float = within(0, default=0.0)
    no_text: float = within(0, default=0.0)


@dataclass(frozen=True, kw_only=True)
class StreamWeights:
    """Factor of the elements of each stream in the loss, see `unidiffuser.training.objective.diffusion_loss`."""

    img: float = within(0, default=1.0)
    clip_img: float = within(0, default=1.0)
    text: float = within(0, default=1.0)


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Pairs for the items with a clean picture (label 0), from which the network learns captions.

    Attributes:
        where: their record filter: more pictures than the network draws.
        versions: copies of each picture, all but the first augmented.
        place: strength of that augmentation.
        other_latent: fraction of the items with the image latent of another picture in the same style, so that only the CLIP
            token identifies the picture. A small set would be memorised by its latents, and unseen pictures captioned
            wrongly although their token is right.
    """

    where: Where
    versions: int = within(1)
    place: float = within(0)
    other_latent: float = within(0, 1)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pairs for the items with a clean caption (label 0), from which the network learns to draw.

    Attributes:
        where: their record filter: more concepts and styles than those of the section.
        fraction, fraction_below: fraction of the items, and that at image labels below `changed_below`.
        changed_below: pictures are mirrored and shifted at image labels below this. Little noise hides little of it, so they
            are denoised rather than memorised; above, the network draws them as they are.
        shift: largest shift in latent cells, in steps of two.
        other_start: fraction of the items, at labels from `other_start_from`, whose noisy picture is that of the same concept
            in another style, see `noise_of_another`. A small network remembers one picture of a concept and begins with it
            in every style; so it learns to leave it.
        other_picture: fraction of the pictures whose captions are always shown with another picture of their concept, in the
            style code of their own. A network with one picture for each caption draws a mean of several for unseen
            captions; so it learns to choose.
        with_style: fraction of captions with the style, of all items but those of the two options above: under captions
            without a style these would teach the network to mix pictures.
    """

    where: Where
    fraction: float = within(0, 1)
    fraction_below: float = within(0, 1)
    changed_below: int = within(0, 1001)
    shift: int = within(0)
    other_start: float = within(0, 1)
    other_start_from: int = within(1, 1001)
    other_picture: float = within(0, 1)
    with_style: float = within(0, 1)


@dataclass(frozen=True, kw_only=True)
class Suggested:
    """Settings that the finished file suggests, see `ModelConfig.defaults`."""

    steps: int = within(1)
    guidance: float = within(1)
    speeds: tuple[float, float] | None = None
    task_steps: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Network(Training):
    """The U-ViT, from scratch, on the latents of all encoders.

    Attributes:
        where: pictures of the items that neither `captioning` nor `drawing` replaces.
        with_style: fraction of their captions that name the style.
        sizes, mix, weights: see there.
        lean, logit_normal: density of noise levels, see `unidiffuser.training.objective.draw_labels`.
        suggested: defaults in the file.
        sample_prompts: captions of the sample grid.
    """

    where: Where
    with_style: float = within(0, 1)
    sizes: Sizes
    mix: Mix
    weights: StreamWeights = StreamWeights()
    lean: float = within(0, default=0.0)
    logit_normal: tuple[float, float] | None = None
    captioning: Captioning | None = None
    drawing: Drawing | None = None
    suggested: Suggested
    sample_prompts: tuple[str, ...] | None = None
