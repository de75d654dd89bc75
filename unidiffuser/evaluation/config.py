"""The YAML file of an evaluation: model, data, feature extractor, tasks, sweeps; examples in `evaluation/configs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from ..media.json_files import brief, shown_list
from ..media.yaml_settings import parse, read_mapping, typed
from ..options import Options, check

Config = TypeVar("Config", bound="EvaluationConfig")
TASKS = ("autoencode", "text_to_image", "image_to_text", "joint", "image")


@dataclass
class Sweep:
    """Text to image at several values of one option.

    Attributes:
        values: of the option; all others stay at the config's.
        split: whose captions are used; tune options on a split that you do not report.
        limit: number of captions, the first of a fixed shuffle.
    """

    values: list[float]
    split: str
    limit: int | None = None


@dataclass
class Retrieval:
    """Retrieval among real pairs, scored by the network's denoising error.

    Attributes:
        split: whose pairs are used.
        count: number of pairs.
        levels: noise levels the error is averaged over.
    """

    split: str
    count: int = 64
    levels: int = 4


@dataclass
class Diversity:
    """Several pictures of one caption.

    Attributes:
        split: whose captions are used.
        captions: number of captions.
        count: pictures for each.
    """

    split: str
    captions: int = 32
    count: int = 4


@dataclass
class EvaluationConfig:
    """Settings of one evaluation.

    Attributes:
        model: name, file or folder, as for `unidiffuser.load`.
        out: folder of the run: `cells/`, `scores.json`, `scores.md`, `report.html`.
        data: pictures and captions, see `unidiffuser.evaluation.sources`.
        splits: values of the field `split` to evaluate on; "all" is every pair.
        training: the training pictures, to measure memorisation, or None; same form as `data`.
        features: "clip" (the checkpoint's own image encoder) or the file of Inception's weights.
        clip: folder of a CLIP model for CLIP scores, or None.
        tasks: of `TASKS`.
        seeds: every task runs once with each.
        steps, guidance, method, speeds: None is the checkpoint's default; guidance is one number or two (image, text); speeds
            (image, text) shape the path of the task joint.
        limit: largest number of pictures or captions of a split, the first of a fixed shuffle.
        pairs: items of joint and image for each seed.
        batch: batch size, and the number of items that are saved together.
        image_size: pixels; side of the pictures given to the feature extractors; None is the model's own.
        guidance_sweep, steps_sweep, retrieval, diversity: None leaves them out.
        device, dtype: None is the best device and its default dtype.
    """

    data: dict[str, Any]
    model: str = "emoji"
    out: str = "out/evaluation"
    splits: list[str] = field(default_factory=lambda: ["all"])
    training: dict[str, Any] | None = None
    features: str = "clip"
    clip: str | None = None
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int | None = None
    guidance: float | list[float] | None = None
    method: str | None = None
    speeds: list[float] | None = None
    limit: int | None = None
    pairs: int = 256
    batch: int = 16
    image_size: int | None = None
    guidance_sweep: Sweep | None = None
    steps_sweep: Sweep | None = None
    retrieval: Retrieval | None = None
    diversity: Diversity | None = None
    device: str | None = None
    dtype: str | None = None

    @classmethod
    def from_file(
        cls: type[Config],
        path: str | Path,
        overrides: Sequence[str] = (),
        model: str | None = None,
        out: str | None = None,
    ) -> Config:
        """Read a YAML file.

        Args:
            path: the file.
            overrides: `"name=value"` with the value in YAML, such as `"tasks=[joint]"`; they replace the file's settings.
            model, out: likewise, where they are not None.

        Raises:
            FileNotFoundError: no such file.
            ValueError: unknown, missing or invalid settings.
        """
        path = Path(path)
        values = read_mapping(path, "evaluation")
        parts = (entry.partition("=") for entry in overrides)
        given = {name: parse(text, f"--set {name}={text}") for name, _, text in parts}
        given |= {name: text for name, text in (("model", model), ("out", out)) if text is not None}
        return cls.of(values | given, str(path))

    @classmethod
    def of(cls: type[Config], values: dict[str, Any], name: str = "the config") -> Config:
        """From plain values, checked; a ValueError begins with `name`."""
        values = dict(values)
        if "judge" in values and "judge" not in {f.name for f in fields(cls)} and values.pop("judge") is not None:
            raise ValueError(
                f"{name}: `judge` classifies the bundled model's pictures only; "
                "run `python -m unidiffuser.emoji evaluate` with this config, or remove `judge`"
            )
        _known(cls, values, name)
        for key, kind in (
            ("guidance_sweep", Sweep),
            ("steps_sweep", Sweep),
            ("retrieval", Retrieval),
            ("diversity", Diversity),
        ):
            if values.get(key) is not None:
                _known(kind, values[key], f"{name}, {key}")
                values[key] = kind(**typed(kind, values[key], f"{name}, {key}"))
        config = cls(**typed(cls, values, name))
        config._check(name)
        return config

    def _check(self, name: str) -> None:
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"{name}: unknown tasks {shown_list(unknown)}; known are {', '.join(TASKS)}")
        if not self.seeds or not self.splits:
            raise ValueError(f"{name}: give at least one seed and one split")
        least = {"batch": 1, "pairs": 2, "limit": 2, "image_size": 16, "steps": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: {key} must be a whole number of at least {low}, got {brief(value)}")
        tried: list[dict[str, Any]] = [self.options()]
        for key, option in (("guidance_sweep", "guidance"), ("steps_sweep", "steps")):
            sweep = getattr(self, key)
            if sweep is not None and not sweep.values:
                raise ValueError(f"{name}: {key} has no values")
            tried += [{option: int(x) if option == "steps" else x} for x in (sweep.values if sweep is not None else ())]
        for options in tried:
            try:
                check(cast("Options", options))
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{name}: {error}") from None
        if self.diversity is not None and (self.diversity.captions < 1 or self.diversity.count < 2):
            raise ValueError(f"{name}: diversity needs at least 1 caption and a count of 2")
        if self.retrieval is not None and (self.retrieval.count < 2 or self.retrieval.levels < 1):
            raise ValueError(f"{name}: retrieval needs a count of at least 2 and at least 1 level")

    def options(self, **changed: Any) -> dict[str, Any]:
        """Sampling options for `unidiffuser.evaluation.sampling.ModelSampler`, without those that are None."""
        guidance = tuple(self.guidance) if isinstance(self.guidance, list) else self.guidance
        given = {"steps": self.steps, "guidance": guidance, "method": self.method, "speeds": self.speeds} | changed
        return {key: value for key, value in given.items() if value is not None}


def _known(kind: type, values: Any, name: str) -> None:
    known = {f.name for f in fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a mapping of {', '.join(sorted(known))}")
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"{name}: unknown settings {shown_list(unknown)}; known are {', '.join(sorted(known))}")
    required = [key for key in ("data", "values", "split") if key in known and key not in values]
    if required:
        raise ValueError(f"{name}: missing {' and '.join(required)}")
