"""The recipe of the bundled model: one YAML file with a section for each part of it.

`recipe.yaml` is the recipe for a data-centre GPU. A section reads what earlier sections have written and the image folder that
`data` names, nothing else. Settings of the sections: `options.py` and `network_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..media.yaml_settings import read_mapping
from .network_options import Network
from .options import Autoencoder, Captioner, Encoders, Finish
from .settings import read_settings, within


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """How `data.folder` is made from the npm packages.

    Attributes:
        size: side of the pictures in pixels.
        packages: folder with the packages, for a machine without npm; fetched into `data.folder` if null.
        workers: rendering processes.
    """

    size: int = within(16)
    packages: str | None = None
    workers: int = within(1, default=2)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The image folder of all sections.

    Attributes:
        folder: contains `metadata.jsonl`, whose records have "file_name", "text" (captions with and without the style),
            "label" (the concept), "style" and "split".
        prepare: make the demonstration data there; null for a folder that exists.
    """

    folder: str
    prepare: Prepare | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a model.

    Attributes:
        seed: of initial weights, order of the data and all random numbers.
        precision: as in `TrainConfig`.
    """

    data: Data
    autoencoder: Autoencoder
    encoders: Encoders
    captioner: Captioner
    network: Network
    finish: Finish
    seed: int = within(0, default=0)
    precision: Literal["auto", "bf16", "no"] = "auto"

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read and check a YAML file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a setting is unknown, missing or impossible; the text is one line that names it.
        """
        recipe = read_settings(cls, read_mapping(path, "recipe"), str(path))
        recipe._check(str(path))
        return recipe

    def _check(self, name: str) -> None:
        """Settings that must fit one another."""
        if not any(vars(self.network.mix).values()):
            raise ValueError(f"{name}.network.mix is 0 everywhere; give at least one region a fraction above 0")
        side = self.autoencoder.image_size * (1 if self.finish.upsampler is None else 2)
        if self.finish.image_size != side:
            raise ValueError(f"{name}.finish.image_size must be {side}, from autoencoder.image_size and finish.upsampler")
        cell = self.autoencoder.patch_size * 2 ** (len(self.autoencoder.channels) - 1)
        cells = self.autoencoder.image_size // cell
        if self.finish.crop is not None and self.finish.crop > cells:
            raise ValueError(f"{name}.finish.crop must be at most {cells}, the side of a latent, not {self.finish.crop}")
        if self.autoencoder.image_size % cell or cells % self.network.sizes.patch_size:
            raise ValueError(
                f"{name}.autoencoder.image_size must be a multiple of {cell * self.network.sizes.patch_size}, which is "
                f"{cell} pixels a latent cell times network.sizes.patch_size"
            )
        low, high = self.finish.labels
        if low > high:
            raise ValueError(f"{name}.finish.labels must be the lower and the higher label, not {low} and {high}")
        if self.network.logit_normal is not None and self.network.logit_normal[1] <= 0:
            raise ValueError(
                f"{name}.network.logit_normal must be a mean and a std above 0; got {self.network.logit_normal[1]}"
            )
        if not 0 < self.finish.denoised < 1:
            raise ValueError(f"{name}.finish.denoised must be between 0 and 1, since a batch has both kinds of latents")
        if len(self.encoders.image.stem.channels) < 2:
            raise ValueError(f"{name}.encoders.image.stem.channels needs two widths or more, since it needs a block")
