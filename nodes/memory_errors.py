"""Advice when main memory runs out. For GPU memory the host has its own message, and unloads all models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def say_what_to_do() -> Iterator[None]:
    """Turns running out of main memory into a MemoryError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):  # how torch reports it on a CPU
            raise
        raise MemoryError(
            f"There is not enough memory ({error}). Use a lower batch size or a smaller LATENT, or unload the models of other "
            f"workflows from the menu."
        ) from error
