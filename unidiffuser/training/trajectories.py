"""Sampling trajectories of a guided teacher, kept at the few noise levels at which a student will evaluate the network.

A route is a noise path with many steps, of which every n-th point is kept. The trajectories of all routes lie in one folder, in
files of a few hundred, each drawn from seeds of its own, so an interrupted run continues and several processes share the work:

    img       (N, K, C, h, w) fp16    states of the image latent at the K kept points; K = 1 if the route holds it clean
    clip_img  (N, K, 1, D)    fp16    of the CLIP image token
    text      (N, K, L, d)    fp16    of the text latent

A stream that the route marginalises is pure noise at every evaluation and is not kept.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..data.shards import write_shard
from ..distributed import World
from ..media.files import write_text
from ..media.resume import check_settings, run_parts
from ..path import CLEAN, NoisePath
from ..samplers import sample
from ..streams import MODALITY_OF, Streams, draw_noise, item_generators
from ..uvit import UViT

INDEX = "trajectories.json"
PATHS: Mapping[str, Callable[..., NoisePath]] = {
    "text_to_image": NoisePath.text_to_image,
    "image_to_text": NoisePath.image_to_text,
    "joint": NoisePath.joint,
    "image": NoisePath.image,
    "text": NoisePath.text,
}
PART = 64  # trajectories of a file, and the batch in which they are drawn


@dataclass(frozen=True)
class Route:
    """A noise path that a student learns to follow in few steps.

    Attributes:
        task: one of `PATHS`.
        steps: of the student.
        every: steps of the teacher for each of them.
        guidance: of the teacher; the student's is 1.
        count: trajectories.
        speeds: of (image, text), for "joint".

    Raises:
        ValueError: an unknown task, or a number below 1.
    """

    task: str
    steps: int = 4
    every: int = 5
    guidance: float = 3.0
    count: int = 4096
    speeds: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.task not in PATHS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(PATHS)}")
        for name in ("steps", "every", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.task}: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def path(self) -> NoisePath:
        """The teacher's path."""
        more = {"speeds": self.speeds} if self.task == "joint" else {}
        return PATHS[self.task](self.steps * self.every, **more)

    @property
    def student_path(self) -> NoisePath:
        """The student's path: every n-th point of the teacher's."""
        return NoisePath(self.path.t_img[:: self.every], self.path.t_text[:: self.every])

    def held(self, modality: str) -> float | None:
        """The label at which "img" or "text" is held, or None if it moves."""
        labels = set(self.path.labels(modality))
        return labels.pop() if len(labels) == 1 else None

    def given(self) -> list[str]:
        """Streams that a trajectory begins with and keeps: those held clean."""
        return [name for name, modality in MODALITY_OF.items() if self.held(modality) == CLEAN]


def draw_trajectories(
    teacher: Callable[[], UViT],
    routes: Sequence[Route],
    given: Callable[[str, int], Streams],
    out: Path,
    settings: Mapping[str, Any],
    world: World,
    *,
    seed: int = 0,
    watch: Callable[[int], None] = lambda done: None,
) -> None:
    """Sample the trajectories of all routes that are not drawn yet.

    Args:
        teacher: builds the network, on the device to sample on; called only if something is left to draw.
        routes: at most one for each task.
        given: called with a task and a number; returns the clean streams (1, ...) of that trajectory's condition.
        out: folder of the files.
        settings: whatever else the trajectories depend on, as JSON values: the model and the conditions.
        world: the processes that share the work; all of them call this.
        seed: of the first trajectory; number k has `seed` + k, in every route.
        watch: called after each file with its number of trajectories.

    Raises:
        ValueError: two routes of one task; a folder with trajectories of other settings.
    """
    if len({route.task for route in routes}) < len(routes):
        raise ValueError("each task can have one route; remove the others")
    out.mkdir(parents=True, exist_ok=True)
    described = {"routes": {route.task: asdict(route) for route in routes}, "seed": seed, **settings}
    check_settings(out / "settings.json", described, world)
    parts = [(route, first) for route in routes for first in range(0, route.count, PART)]
    files = [out / f"{route.task}-{first // PART:05d}.safetensors" for route, first in parts]

    network = functools.cache(teacher)

    def draw(number: int) -> None:
        route, first = parts[number]
        count = min(PART, route.count - first)
        conditions = [given(route.task, first + k) for k in range(count)] if route.given() else []
        start = Streams(**{name: torch.cat([one.need(name) for one in conditions]) for name in route.given()})
        write_shard(files[number], _trajectories(network(), route, start, seed + first, count), {"task": route.task})
        watch(count)

    run_parts(files, draw, world)
    world.barrier()
    if world.main:
        listed = [{"task": route.task, "file": file.name} for (route, _), file in zip(parts, files, strict=True)]
        write_text(out / INDEX, json.dumps({"settings": described, "files": listed}, indent=1))
    world.barrier()


def _trajectories(net: UViT, route: Route, start: Streams, seed: int, count: int) -> dict[str, Tensor]:
    """States of `count` trajectories at the kept points, fp16 on the CPU."""
    moving = [name for name, modality in MODALITY_OF.items() if route.held(modality) is None]
    states: dict[str, list[Tensor]] = {name: [] for name in moving}

    def keep(step: int, total: int, x0: Streams, x: Streams) -> None:
        if (step + 1) % route.every == 0:
            for name in moving:
                states[name].append(x.need(name).to("cpu", torch.float16))

    generators = item_generators(seed, count)
    noise = {name: draw_noise(net.config.item_shapes[name], generators, "cpu") for name in moving}
    sample(net, route.path, start.replace(**noise), guidance=route.guidance, generator=generators, callback=keep)
    whole = {name: torch.stack([noise[name].to(torch.float16), *states[name]], dim=1) for name in moving}
    return whole | {name: value.to("cpu", torch.float16)[:, None] for name, value in start.items()}


class Trajectories:
    """The trajectories of a folder, numbered through all files.

    Args:
        folder: written by `draw_trajectories`.

    Attributes:
        routes: by task.
        size: number of trajectories.
        fingerprint: digest of what they were drawn with.

    Raises:
        FileNotFoundError: no finished trajectories there.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{self.folder} has no {INDEX}; draw the trajectories first, with `unidiffuser distill`")
        text = (self.folder / INDEX).read_text(encoding="utf-8")
        self.index: dict[str, Any] = json.loads(text)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        found = self.index["settings"]["routes"].items()
        self.routes = {task: Route(**{**values, "speeds": tuple(values["speeds"])}) for task, values in found}
        self._firsts = list(itertools.accumulate((route.count for route in self.routes.values()), initial=0))
        self.size = self._firsts[-1]

    @functools.cached_property
    def _states(self) -> dict[str, dict[str, Tensor]]:
        """All states of each task in memory: a student needs thousands of trajectories, not millions."""
        parts: dict[str, list[dict[str, Tensor]]] = {task: [] for task in self.routes}
        for entry in self.index["files"]:
            with safe_open(self.folder / entry["file"], "pt") as file:
                parts[entry["task"]].append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return {task: {name: torch.cat([part[name] for part in found]) for name in found[0]} for task, found in parts.items()}

    def _place(self, index: int) -> tuple[Route, int]:
        number = bisect.bisect_right(self._firsts, index) - 1
        return list(self.routes.values())[number], index - self._firsts[number]

    def route_of(self, index: int) -> Route:
        """The route of a trajectory."""
        return self._place(index)[0]

    def read(self, index: int, before: int, after: int) -> dict[str, tuple[Tensor, Tensor]]:
        """States of a trajectory at two of its kept points, float32; those of a held stream are equal."""
        route, position = self._place(index)
        rows = {name: states[position].float() for name, states in self._states[route.task].items()}
        return {name: (row[min(before, len(row) - 1)], row[min(after, len(row) - 1)]) for name, row in rows.items()}

    def ends(self, route: Route, count: int) -> tuple[Streams, Streams]:
        """First and last states of the first `count` trajectories of a route, float32."""
        states = {name: value[:count].float() for name, value in self._states[route.task].items()}
        return Streams(**{n: x[:, 0] for n, x in states.items()}), Streams(**{n: x[:, -1] for n, x in states.items()})
