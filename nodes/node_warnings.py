"""The warnings of one run: each is given once, in the log and on the node that is running."""

from __future__ import annotations

from .types import show_warning


class Warnings:
    """Collects what a run has to say of the nodes behind its MODEL."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.effects: dict[str, bool] = {}

    def warn(self, text: str) -> None:
        """Show a sentence once."""
        if text not in self.given:
            self.given.add(text)
            show_warning(text)

    def acted(self, name: str, changed: bool) -> None:
        """Note whether a call of a node's patch changed anything."""
        self.effects[name] = self.effects.get(name, False) or changed

    def finish(self) -> None:
        """Warn of the patches that changed nothing in the whole run."""
        for name, changed in self.effects.items():
            if not changed:
                self.warn(f"'{name}' is made for the channels of a U-Net, so it has no effect on UniDiffuser.")
