"""Long runs of bytes that two texts have in common, in the same order.

Headers and graphs are small, and change in a few places: a length, a name. After each the next bytes are
looked up in the old text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from ia3_export.fold import Array

#: Shorter runs cost more as a piece of their own than they save.
_SHORTEST = 256
#: How many bytes are looked up at a time, and how far ahead of the last run at least and at most.
_PROBE, _AHEAD, _FARTHEST = 32, 1 << 16, 1 << 18
#: Behind a difference so many places are looked up one after the other, and then places so far apart.
_STEP = 64
#: After so many bytes without anything known nothing more is looked up.
_PATIENCE = 4 << 20


def matching_runs(old: bytes, new: bytes) -> Iterator[tuple[int, int, int]]:
    """Where a run starts in `new`, its length, and where it starts in `old`; rising in both."""
    a, b = np.frombuffer(old, "u1"), np.frombuffer(new, "u1")
    i = j = done = 0
    while i < len(new):
        run = _common(a[j:], b[i:])
        if run >= _SHORTEST or run == len(new):
            back = _common(a[:j][::-1], b[done:i][::-1]) if i > done else 0
            yield i - back, run + back, j - back
            i, j = i + run, j + run
            done = i
        i, j = _next(old, new, i, j)


def _common(a: Array, b: Array) -> int:
    """Length of the common beginning."""
    count, step = min(len(a), len(b)), 1 << 12
    done = 0
    while done < count:
        differ = a[done : done + step][: count - done] != b[done : done + step][: count - done]
        if differ.any():
            return done + int(np.argmax(differ))
        done, step = done + step, step * 4
    return count


def _next(old: bytes, new: bytes, i: int, j: int) -> tuple[int, int]:
    """A place in `new` after `i` whose bytes are in `old` after `j`, and where; the end if there is none."""
    near, end = range(i + 1, min(i + _STEP, len(new))), min(i + _PATIENCE, len(new))
    for at in chain(near, range(i + _STEP, end, _STEP)):
        found = old.find(new[at : at + _PROBE], j, j + min(_AHEAD + at - i, _FARTHEST))
        if found >= 0:
            return at, found
    return len(new), j
