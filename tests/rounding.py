"""What may differ between batches in float32: nothing with AVX-512, else the last bits, see `precision.depends_on_batch`.

The products of a CPU without it add in an order that depends on the batch and on where it lies in memory.
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import pytest
import torch

EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"
LAST_BITS = {torch.float32: 1e-5, torch.float16: 2**-10}  # of values up to 1, and relative to larger ones
SCORES = 1e-2  # relative: log-odds are small differences of sums


def assert_same(found: Any, expected: Any) -> None:
    """Equal, but for the last bits of numbers where `EXACT` is false. For tensors, captions, scores, and lists of them."""
    if isinstance(found, torch.Tensor):
        last = 0 if EXACT else LAST_BITS.get(found.dtype, 0)
        torch.testing.assert_close(found, expected, rtol=last, atol=last)
    elif is_dataclass(found) and not isinstance(found, type):
        assert type(found) is type(expected)
        assert_same(list(asdict(found).values()), list(asdict(expected).values()))
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, float) and not EXACT:
        assert found == pytest.approx(expected, rel=SCORES, abs=0)
    else:
        assert found == expected
