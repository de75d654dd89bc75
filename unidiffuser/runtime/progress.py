"""Progress of a run in several batches: a bar, or the caller's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ..samplers import Callback
from ..streams import Streams


@contextmanager
def reporter(progress: bool | Callback, total: int) -> Iterator[Callable[[int], Callback | None]]:
    """A function that returns, for the number of steps done before, a callback for `sample` that counts up to `total`."""
    if callable(progress):
        call = progress
        yield lambda done: lambda step, _, x0, x: call(done + step, total, x0, x)
    elif progress:
        with tqdm(total=total, unit="step", leave=False) as bar:

            def counting_from(done: int) -> Callback:
                def advance(step: int, _: int, x0: Streams, x: Streams) -> None:
                    bar.update(done + step + 1 - bar.n)

                return advance

            yield counting_from
    else:
        yield lambda done: None
