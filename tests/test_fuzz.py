"""Mutants of files and texts from outside load, or end in one line; `python tests/fuzz.py` tries more of them."""

from __future__ import annotations

import sys

import pytest
from fuzz import run
from fuzz_kinds import HOST, KINDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and memory are watched through /proc")
LIBRARY = [name for name in KINDS if name not in HOST]
MANY = 500


@pytest.mark.parametrize("kind", LIBRARY)
def test_mutants(kind: str) -> None:
    count = {"diffusers": 15, "original": 10}.get(kind, 40)  # large vocabularies take their time
    outcome = run(kind, range(count))
    assert outcome.counts["loaded"] + outcome.counts["error"] == count, outcome.bad
    assert outcome.counts["error"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIBRARY)
def test_many_mutants(kind: str) -> None:
    outcome = run(kind, range(1000, 1000 + MANY))
    assert not outcome.bad, (outcome.line(kind), outcome.bad)
