"""Long runs that two headers or graphs have in common."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_export.patching.runs import matching_runs


def rebuilt(old: bytes, new: bytes) -> int:
    """Check the runs of two texts; how many bytes of `new` they hold."""
    end = before = total = 0
    for at, length, where in matching_runs(old, new):
        assert end <= at and before <= where
        assert old[where : where + length] == new[at : at + length] and length
        end, before, total = at + length, where + length, total + length
    return total


@given(st.binary(max_size=900), st.lists(st.tuples(st.integers(0, 899), st.binary(max_size=9)), max_size=4))
@settings(max_examples=200, deadline=None)
def test_runs_are_the_same_in_both_and_rise(old: bytes, edits: list[tuple[int, bytes]]) -> None:
    new = bytearray(old)
    for at, data in edits:
        new[at : at + 3] = data
    rebuilt(old, bytes(new))


def test_all_but_the_edits_is_found() -> None:
    old = np.random.default_rng(0).integers(0, 256, 200_000).astype("u1").tobytes()
    new = b"longer" + old[2:9000] + old[9100:50_000] + b"x" * 700 + old[50_000:150_001] + b"y" + old[150_002:]
    assert rebuilt(old, new) == len(new) - len(b"longer") - 700 - 1
    assert rebuilt(old, old) == len(old)
    assert rebuilt(b"", old) == rebuilt(old, b"") == 0


def test_texts_without_anything_in_common_take_no_time() -> None:
    old, new = (
        np.random.default_rng(seed).integers(0, 256, 4 << 20).astype("u1").tobytes() for seed in (0, 1)
    )
    start = time.monotonic()
    assert rebuilt(old, new) == 0
    assert time.monotonic() - start < 60
