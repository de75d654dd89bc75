"""What the nodes say when main memory runs out. The host itself speaks up when a GPU's does, and then unloads all models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def say_what_to_do() -> Iterator[None]:
    """Within this, running out of main memory is a MemoryError that advises the artist."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):  # what torch raises on a CPU
            raise
        raise MemoryError(
            f"There is not enough memory ({error}). Make fewer or smaller pictures at once: a lower batch size, a smaller "
            f"LATENT. Models that other workflows have left loaded can be unloaded from the menu."
        ) from error
