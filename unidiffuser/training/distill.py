"""Stage "distill": a student that follows a teacher's noise paths in few unguided evaluations.

The teacher's guided trajectories (Meng et al., arXiv 2210.03142) are kept at the student's few noise levels (`trajectories`),
and from each of these states the student learns to predict where its trajectory ends: consistency distillation (Song et al.,
arXiv 2303.01469) towards the ends themselves. The method "lcm" samples it (Luo et al., arXiv 2310.04378): predict the end, add
fresh noise up to the next level, predict again. So one evaluation gives a result and each further one mends it. The noise hides
what an early prediction lacks in detail; a deterministic step would pass that on to a network that has never seen it. Both
modalities have targets where both move, so one student serves text-to-image, captioning, joint sampling and any other route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..encoders.autoencoder import Autoencoder
from ..media.images import to_images
from ..runtime.fast_lora import JOINT
from ..runtime.lora import write_lora
from ..runtime.precision import weight_dtype
from ..samplers import sample
from ..schedule import alpha_sigma
from ..streams import MODALITY_OF, Streams, draw_normal, item_generators
from ..uvit import Block, Predictions, UViT
from .adapters import AdaptedModel
from .config import TrainConfig, stage_options
from .network import example_cost, export_model, trainable_network
from .sharding import is_sharded
from .stage import Batch, ExampleCost, TrainingStage
from .trajectories import Route, Trajectories

LORA, MODEL = "lora.safetensors", "model.safetensors"
METHOD = "lcm"
HUBER = 0.03  # root of the mean squared error of a velocity below which the loss is quadratic
SHOWN = 8  # pictures of the sample grid


class Student(nn.Module):
    """A network that learns as a whole, or by adapters alone.

    Args:
        network: float32; it is changed in place.
        rank: of the adapters; None trains all weights.
        seed: of the adapters' initial values.
    """

    def __init__(self, network: UViT, rank: int | None, seed: int):
        super().__init__()
        self.adapted = None if rank is None else AdaptedModel(network, None, rank, seed)
        self.network = network.requires_grad_(True) if self.adapted is None else network

    def forward(self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor) -> Predictions:
        """Predicted noise of the three streams, in the shapes of the inputs; labels (B,)."""
        predicted: Predictions = self.network(img, clip_img, text, t_img, t_text)
        return predicted


class DistillStage(TrainingStage):
    """Trains a student on trajectories.

    Options:
        checkpoint: the teacher, from whose weights the student starts.
        trajectories: folder of `draw_trajectories`.
        fewest: by task, the steps that `preset="fast"` takes; a divisor of its route's steps, and these if absent.
        rank: of a LoRA; absent, all weights are trained and a complete model is written.
        dtype: of the exported LoRA or model, "float16" if absent.

    Raises:
        FileNotFoundError: no trajectories, or no checkpoint.
        ValueError: an unknown option, or one of another type or out of range.
    """

    blocks = (Block,)
    model: Student

    def __init__(self, config: TrainConfig):
        known = {"checkpoint": str, "trajectories": str, "fewest": dict, "rank": int | None, "dtype": str}
        options = stage_options(config.options, known)
        self.out, self.name = Path(config.out), options["checkpoint"]
        self.rank: int | None = options.get("rank")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        self.dtype = weight_dtype(options.get("dtype")) or torch.float16
        self.trajectories = Trajectories(options["trajectories"])
        self.size = self.trajectories.size
        self.fewest = fewest_of(options.get("fewest", {}), self.trajectories.routes)
        self.checkpoint: Checkpoint = load_checkpoint(self.name)
        network = trainable_network(self.checkpoint.config.uvit, self.checkpoint.state_dict("uvit", dtype=torch.float32))
        self.model = Student(network, self.rank, config.seed)

    def fingerprint(self) -> str:
        return f"{self.trajectories.fingerprint} rank {self.rank}"

    def cost(self) -> ExampleCost:
        return example_cost(self.checkpoint.config.uvit)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        rows = [self._example(index, seed) for index, seed in zip(indices.tolist(), seeds, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _example(self, index: int, seed: int) -> Batch:
        """A point of a trajectory: state, labels, where it ends, and the labels of what moves (0 for what does not)."""
        generator = torch.Generator().manual_seed(seed)
        route = self.trajectories.route_of(index)
        point = int(torch.randint(route.steps, (), generator=generator, device=generator.device))
        states = self.trajectories.read(index, point, route.steps)
        example: Batch = {}
        for name, modality in MODALITY_OF.items():
            labels = route.student_path.labels(modality)
            label = torch.tensor(labels[point], dtype=torch.float32)
            if name in states:
                here, end = states[name]
            else:  # marginalised: noise at each evaluation
                here = end = draw_normal(self.model.network.config.item_shapes[name], generator)
            example |= {name: here, f"x0_{name}": end, f"t_{modality}": label}
            example[f"moves_{modality}"] = label if labels[point + 1] < labels[point] else torch.zeros(())
        return example

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """ "img", "clip_img" and "text": mean errors of the streams where they move."""
        predicted = Streams(*model(*(batch[name] for name in MODALITY_OF), batch["t_img"], batch["t_text"]))
        terms = {}
        errors, elements = torch.zeros(2, len(batch["t_img"]), dtype=torch.float32, device=batch["t_img"].device).unbind()
        for name, eps in predicted.items():
            label = batch[f"moves_{MODALITY_OF[name]}"].float()
            error, count = velocity_errors(eps, batch[name], batch[f"x0_{name}"], label)
            terms[name] = (error.sum() / count.sum().clamp_min(1)).detach()
            errors, elements = errors + error, elements + count
        return {"loss": pseudo_huber(errors / elements).mean(), **terms}

    @cached_property
    def _decode(self) -> Autoencoder:
        return Autoencoder.from_checkpoint(self.checkpoint, "cpu", torch.float32)

    def sample(self, model: Any) -> Image.Image | None:
        """The first pictures of each route that draws some: the teacher's, and below them the student's from the same noise."""
        if is_sharded(self.model):
            return None
        device, rows = next(self.model.parameters()).device, []
        for route in self.trajectories.routes.values():
            if route.held("img") is not None:
                continue
            count = min(SHOWN, route.count)
            start, end = self.trajectories.ends(route, count)
            settings: dict[str, Any] = {"method": METHOD, "generator": item_generators(0, count)}
            drawn = sample(self.model.network, route.student_path, start.to(device), **settings)
            rows += [end.need("img"), drawn.need("img").cpu()]
        if not rows:
            return None
        pixels = [self._decode.decode(x) for x in rows]
        return to_images(torch.cat([torch.cat(list(row), dim=2) for row in pixels if len(row) == len(pixels[0])], dim=1)[None])[
            0
        ]

    def export(self, model: Any) -> None:
        """Write the LoRA, or the checkpoint with the student's network."""
        student: Student = model
        routes = {
            task: {"steps": route.steps, "fewest": self.fewest[task], "speeds": route.speeds}
            for task, route in self.trajectories.routes.items()
        }
        if student.adapted is not None:
            about = {"model": self.name, "rank": self.rank, "distilled": routes, "method": METHOD, "guidance": 1}
            write_lora(self.out / LORA, student.adapted.changes(), about, self.dtype)
            return
        steps = max(route.steps for route in self.trajectories.routes.values())
        defaults = {**self.checkpoint.config.defaults, "steps": steps, "guidance": 1.0, "method": METHOD}
        defaults["task_steps"] = {task: route["fewest"] for task, route in routes.items()}
        if JOINT in routes:
            defaults["speeds"] = routes[JOINT]["speeds"]
        export_model(self.checkpoint, student.network, self.out / MODEL, self.dtype, defaults)


def fewest_of(given: Mapping[str, Any], routes: Mapping[str, Route]) -> dict[str, int]:
    """Steps of the fast preset on each route, by task; those of the route where none are given.

    Raises:
        ValueError: a task without a route, or a number that does not divide its steps.
    """
    if unknown := given.keys() - routes.keys():
        raise ValueError(f"fewest steps are given for {', '.join(map(str, unknown))}; routes are {', '.join(routes)}")
    fewest = {}
    for task, route in routes.items():
        number = given.get(task, route.steps)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1 or route.steps % number:
            raise ValueError(f"the fewest steps of {task} must divide its {route.steps} steps, got {number!r}")
        fewest[task] = number
    return fewest


def pseudo_huber(squared: Tensor) -> Tensor:
    """sqrt(e + c^2) - c of mean squared errors e (B,), c = `HUBER` (Song and Dhariwal, arXiv 2310.14189, section 3.3).

    Large errors pull less than squared ones: near pure noise many ends are possible, and their mean is a blur.
    """
    return (squared + HUBER**2).sqrt() - HUBER


def velocity_errors(eps: Tensor, x: Tensor, x0: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity of a stream, summed over each item, and the number of elements summed; both (B,).

    The velocity alpha eps - sigma x_0 weighs the error of x_0 by SNR + 1, which stays sound at the high noise of a first step,
    where that of the noise says nothing of the picture (Salimans and Ho, section 4).

    Args:
        eps: predicted noise (B, ...).
        x: the state that it was predicted from.
        x0: the wanted x_0.
        label: (B,); rows at 0 do not move and count no elements.
    """
    moves = label > 0
    alpha, sigma = (level.view(-1, *[1] * (x.ndim - 1)) for level in alpha_sigma(label.clamp_min(1.0)))
    error = (eps.float() - (x - alpha * x0) / sigma) / alpha
    squared = error.square().flatten(1)
    return squared.sum(1) * moves, moves * float(squared.shape[1])
