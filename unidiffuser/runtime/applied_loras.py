"""The LoRAs that are applied to the parts of a checkpoint, exchangeable while the parts are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.vocabulary import Vocabulary
from .fast_lora import fast_lora_of
from .lora import LORA_PARTS, LoRA, apply_loras, layers_of, read_lora

Module = TypeVar("Module", bound=nn.Module)
STUDENT = ""  # no file has this path


class AppliedLoRAs:
    """LoRAs with their strengths, and the loaded modules that they change.

    Args:
        checkpoint: holds the weights without LoRAs.

    Attributes:
        student: the checkpoint's fast LoRA, or None.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.student = fast_lora_of(checkpoint.path)
        self._loras: dict[str, tuple[LoRA, float]] = {}  # by path
        self._modules: dict[str, nn.Module] = {}  # by the part's name in the checkpoint

    def load(self, path: str | os.PathLike[str], strength: float) -> None:
        """Apply a LoRA file; one that is already applied gets the new strength.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no LoRA, or one for another model; the LoRAs applied before stay.
        """
        self._exchange(self._loras | {os.fspath(path): (self._read(path), strength)})

    def use_student(self, on: bool) -> None:
        """Apply the checkpoint's fast LoRA besides the others, or remove it; nothing is computed if nothing changes."""
        path = self.student
        if on and path is not None and STUDENT not in self._loras:
            self._exchange(self._loras | {STUDENT: (self._read(path), 1.0)})
        elif not on and STUDENT in self._loras:
            self._exchange({name: value for name, value in self._loras.items() if name != STUDENT})

    def _read(self, path: str | os.PathLike[str]) -> LoRA:
        parts = [part for part in LORA_PARTS if part in self.checkpoint.parts()]
        return read_lora(path, {part: layers_of(self.checkpoint.state_dict(part)) for part in parts})

    def unload(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove a LoRA, or all of them.

        Raises:
            ValueError: this one is not applied.
        """
        if path is not None and os.fspath(path) not in self._loras:
            listed = ", ".join(name for name in self._loras if name != STUDENT)
            raise ValueError(f"{path} is not applied; applied are: {listed or 'none'}")
        self._exchange({} if path is None else {p: v for p, v in self._loras.items() if p != os.fspath(path)})

    def apply_to(self, module: Module, part: str) -> Module:
        """A module that was just loaded, changed by the present LoRAs and by all later exchanges."""
        self._modules[part] = module
        self._apply(module, part, self._loras.values())
        return module

    def forget_modules(self) -> None:
        """Leave the modules as they are from now on; the LoRAs stay, for those that are loaded next."""
        self._modules.clear()

    def extend(self, known: Vocabulary | None) -> Vocabulary | None:
        """A vocabulary with the words of the LoRAs; None if one of them does not list its words."""
        for lora, strength in self._loras.values():
            words = lora.words() if strength else ()
            known = None if known is None or words is None else replace(known, words=(*known.words, *words))
        return known

    def _exchange(self, wanted: dict[str, tuple[LoRA, float]]) -> None:
        before, self._loras = self._loras, wanted
        for part, module in self._modules.items():
            self._apply(module, part, [*before.values(), *wanted.values()])

    def _apply(self, module: nn.Module, part: str, involved: Iterable[tuple[LoRA, float]]) -> None:
        """Set the weights of the layers that `involved` LoRAs change: those applied before and those to be applied."""
        names = {f"{layer}.weight" for lora, _ in involved for layer in lora.changes.get(part, {})}
        if names:
            stored = self.checkpoint.state_dict(part)
            apply_loras(module, part, list(self._loras.values()), {name: stored[name] for name in sorted(names)})
