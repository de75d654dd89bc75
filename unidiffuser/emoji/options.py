"""Settings of the training runs behind the bundled model; those of its network are in `network_options`.

Fields of several runs:

    where        record filter: field of `metadata.jsonl` -> accepted values; pictures of another split than `train` never count
    image_size   side of the pictures in pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from .settings import within

if TYPE_CHECKING:
    from ..training.config import TrainConfig

Where: TypeAlias = dict[str, tuple[str | int | bool, ...]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a training run, see `unidiffuser.training.config.TrainConfig`."""

    steps: int = within(1)
    batch_size: int = within(2)
    learning_rate: float = within(0)
    warmup_steps: int = within(0, default=50)
    decay: float = within(0, 1, default=0.6)
    betas: tuple[float, float] = within(0, 1, default=(0.9, 0.99))
    weight_decay: float = within(0, default=0.0)
    ema_decay: float = within(0, 1, default=0.998)
    optimizer: Literal["adamw", "muon"] = "adamw"
    compile: bool = False
    cuda_graphs: bool = False
    save_every: int = within(1, default=500)
    sample_every: int = within(1, default=10**9)

    def config(self, stage: str, out: Path, seed: int, precision: str) -> TrainConfig:
        """The config of the run, which has its folder at `out`."""
        from ..training.config import TrainConfig

        own = {name: getattr(self, name) for name in Training.__dataclass_fields__}
        return TrainConfig(stage, str(out), seed=seed, precision=precision, **own)


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Exact colours of each style, and the style code in the latents; see `unidiffuser.small.palette`.

    Attributes:
        styles: names of the styles.
        colours: number of colours of each.
    """

    styles: tuple[str, ...]
    colours: int = within(1)


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Training):
    """KL autoencoder; three latent channels are the reduced picture itself.

    Attributes:
        patch_size, channels, layers: see `unidiffuser.emoji.autoencoder.vae_config`.
        mse_weight: weight of the squared error beside the L1 error.
        noise: largest standard deviation of noise on the latents, which have unit variance.
        palette: its colours are counted and its style classifier is fitted after the training; `finish` trains it.
    """

    where: Where
    image_size: int = within(8)
    patch_size: int = within(1)
    channels: tuple[int, ...] = within(1)
    layers: int = within(1)
    mse_weight: float = within(0)
    noise: float = within(0)
    palette: Palette


@dataclass(frozen=True, kw_only=True)
class TextEncoder(Training):
    """CLIP-shaped text encoder, trained contrastively with an image encoder that is not used further.

    Attributes:
        vocabulary_size: of the byte-pair vocabulary, which is made from the captions.
        text_tokens: length of a tokenised caption.
        width, layers: of both transformers.
        image_patch: side of the image encoder's patches in pixels.
        projection: size of the common space.
    """

    where: Where
    image_size: int = within(8)
    vocabulary_size: int = within(512)
    text_tokens: int = within(3)
    width: int = within(1)
    layers: int = within(1)
    image_patch: int = within(1)
    projection: int = within(1)


@dataclass(frozen=True, kw_only=True)
class Stem:
    """Arguments of `unidiffuser.small.stem.ConvStem`."""

    unshuffle: int = within(1)
    channels: tuple[int, ...] = within(1)
    pool: int = within(1, default=1)


@dataclass(frozen=True, kw_only=True)
class ImageEncoder(Training):
    """CLIP-shaped image encoder with a convolutional stem, trained to classify concepts in augmented pictures.

    Attributes:
        width, layers, heads, projection: of the transformer and its output.
        patch_size: side of a token in pixels.
        stem: convolutions in place of the patch embedding.
        place, colour, shade, noise: augmentation, see `unidiffuser.training.augment.augmented`.
        restyle: fraction of the pictures with the feature statistics of others, see `Restyle`.
    """

    where: Where
    image_size: int = within(8)
    width: int = within(1)
    layers: int = within(1)
    heads: int = within(1)
    projection: int = within(1)
    patch_size: int = within(1)
    stem: Stem
    place: float = within(0)
    colour: float = within(0)
    shade: float = within(0)
    noise: float = within(0)
    restyle: float = within(0, 1)


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The encoders of captions and of pictures."""

    text: TextEncoder
    image: ImageEncoder


@dataclass(frozen=True, kw_only=True)
class Captioner(Training):
    """GPT-2-shaped caption decoder, and the text latent.

    Attributes:
        vocabulary_size: of the byte-pair vocabulary, which is made from the captions.
        hidden_dim: size of a text latent's vectors.
        width, layers: of the decoder.
        max_new_tokens: of a caption, the stop token included.
        noise: largest standard deviation of noise on the normalised text latents.
    """

    where: Where
    vocabulary_size: int = within(258)
    hidden_dim: int = within(1)
    width: int = within(1)
    layers: int = within(1)
    max_new_tokens: int = within(2)
    noise: float = within(0)


@dataclass(frozen=True, kw_only=True)
class Upsampler:
    """Sizes of a `unidiffuser.small.upsampler.ConvexUpsampler`."""

    features: int = within(1)
    width: int = within(1)


@dataclass(frozen=True, kw_only=True)
class Finish(Training):
    """The decoder, on latents with noise and on latents that the network denoises.

    Attributes:
        noise: largest standard deviation of noise on the latents; a batch has all levels.
        clean: fraction without noise.
        denoised: fraction of a batch with latents denoised by the network.
        labels: lowest and highest noise label that it denoises from.
        upsampler: doubles the sides of the decoder's pictures, to twice those of the other sections; it needs an
            `autoencoder.patch_size` of 4. null for none.
        crop: side in latent cells of the squares that each batch trains on, as palette and upsampler are most of the work; null
            for whole pictures. The cells at the border of a square see zeros instead of their neighbours, so they are left out
            of the loss.
        psnr_weight: weight of the mean logarithm of the pictures' squared errors, in which a good picture counts as much as a
            bad one.
        random_colours: fraction of the pictures with random colours, so that the classifier learns pictures of no style.
        gate: added to the palette's gates in the file. Training for the least error pulls pixels only part of the way to a
            colour that may be wrong; with 4 all are pulled to it, so a network's pictures have exact colours.
    """

    where: Where
    image_size: int = within(8)
    noise: float = within(0)
    clean: float = within(0, 1)
    denoised: float = within(0, 1)
    labels: tuple[int, int] = within(1, 1000)
    upsampler: Upsampler | None = None
    crop: int | None = within(3, default=None)
    psnr_weight: float = within(0, default=0.0)
    random_colours: float = within(0, 1)
    gate: float = within(0)
