"""The vector that makes one tensor of another, from the two alone.

(IA)3 multiplies channels (Liu et al. 2022, arXiv:2205.05638, section 3.3). A product ``w l`` that was rounded
to ``v`` lay between the middles from ``v`` to its neighbours, so every element confines its channel's factor
to an interval, and all elements of a channel to the intersection. The float32 nearest the middle of that is
tried by the very arithmetic that applies it; nothing is taken that does not give every bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path

import numpy as np

from ia3_export.checkpoint.ranges import read_into
from ia3_export.fold import Array, Workspace, from_float, storage_dtype, to_float
from ia3_export.patching.format import FoldRule
from ia3_export.patching.regions import Region
from ia3_export.patching.rule import chunks, multiply, numbers

#: Records in memory at a time.
_RECORDS = 1 << 18
#: Tried in turn for the channels whose first factor fails: places up and down.
_STEPS = (1, -1, 2, -2)
#: By how much two quotients differ at least that belong to different channels.
_SAME_RUN = 2.0**-6
#: What a computed bound may be off by: the division, and a first rounding to float32 before 16 bits.
_SLACK, _TWICE = 2.0**-50, 2.0**-23


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The same tensor in two open files."""

    old: Region
    new: Region
    old_file: int
    new_file: int

    def read(self, first: int, count: int) -> tuple[Array, Array]:
        """Bytes of records ``first:first+count``, old and new (uint8). Raises `EOFError` and `ReadError`."""
        old, new = (
            _read(file, region.offset + first * region.stride, count * region.stride)
            for file, region in ((self.old_file, self.old), (self.new_file, self.new))
        )
        return old, new


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """`vector` (n,), of which `inner` records share an element, and the dtype that products round to."""

    vector: Array
    inner: int
    rounded: str


def open_pair(old: Path, new: Path) -> tuple[int, int]:
    """Descriptors of two files, for `Pair`."""
    return os.open(old, os.O_RDONLY), os.open(new, os.O_RDONLY)


def _read(file: int, offset: int, count: int) -> Array:
    block = np.empty(count, "u1")
    read_into(file, block.data, offset)
    return block


def is_equal(pair: Pair) -> bool:
    """Whether both regions have the same bytes."""
    if pair.old.nbytes != pair.new.nbytes:
        return False
    records = pair.new.nbytes // pair.new.stride
    step = max(1, (4 << 20) // pair.new.stride)
    for first in range(0, records, step):
        old, new = pair.read(first, min(step, records - first))
        if not np.array_equal(old, new):
            return False
    return True


def solve(pair: Pair, known: Sequence[Array] = ()) -> Solution | None:
    """The vector along some axis that makes ``pair.new`` of ``pair.old``; None if there is none.

    Vectors of `known` are preferred, so that a weight and its bias share one.
    """
    region = pair.new
    if not region.at or region.kind != pair.old.kind:
        return None
    for rounded in _roundings(pair):
        for n, inner in _layouts(pair):
            found = _along(pair, n, inner, rounded, known)
            if found is not None:
                return found
    return None


def make_rule(old: Region, new: Region, solution: Solution, vector: str) -> FoldRule:
    """The piece that makes `new` of `old`; `vector` names the tensor of the patch."""
    return FoldRule(
        offset=old.offset,
        length=new.nbytes,
        dtype=old.dtype,
        rounded=solution.rounded,
        to=new.dtype,
        stride=old.stride,
        at=old.at,
        vector=vector,
        inner=solution.inner,
    )


def _layouts(pair: Pair) -> Iterator[tuple[int, int]]:
    """Lengths of a vector, and how many records share an element of it: along each axis, and in the runs in
    which a flat tensor (the scales of a weight's blocks) keeps its quotient."""
    shape = pair.new.shape
    if len(shape) == 1:
        count = min(_RECORDS, shape[0])
        old, new = pair.read(0, count)
        values = [
            to_float(
                np.ascontiguousarray(numbers(block, region.dtype, region.stride, region.at[0])), region.dtype
            )
            for block, region in ((old, pair.old), (new, pair.new))
        ]
        with np.errstate(all="ignore"):
            quotient = values[1].astype("<f8") / values[0]
            jumps = np.flatnonzero(np.abs(np.diff(quotient)) > _SAME_RUN * np.abs(quotient[1:])) + 1
        run = gcd(shape[0], *map(int, jumps))
        if run > 1:
            yield shape[0] // run, run
    for axis, extent in enumerate(shape):
        yield extent, prod(shape[axis + 1 :])


def _roundings(pair: Pair) -> Iterator[str]:
    """Dtypes that the new values may have been rounded to: first 16 bits, if all fit, in a wider dtype."""
    dtype = pair.new.dtype
    count = min(_RECORDS, pair.new.nbytes // pair.new.stride)
    _, block = pair.read(0, count)
    for narrow in ("BF16", "F16"):
        if narrow == dtype:
            break
        raws = [np.ascontiguousarray(numbers(block, dtype, pair.new.stride, at)) for at in pair.new.at]
        if all(_fits(to_float(raw, dtype), narrow) for raw in raws):
            yield narrow
    yield dtype


def _fits(values: Array, dtype: str) -> bool:
    with np.errstate(all="ignore"):
        rounded = to_float(from_float(values.copy(), dtype), dtype)
    return bool(np.array_equal(rounded, values, equal_nan=True))


def _along(pair: Pair, n: int, inner: int, rounded: str, known: Sequence[Array]) -> Solution | None:
    lo, hi = np.full(n, -np.inf), np.full(n, np.inf)
    for chunk in chunks(pair.new.nbytes // pair.new.stride, n, inner, _RECORDS):
        old, new = pair.read(chunk.first, chunk.count)
        if not _other_bytes_equal(pair, old, new):
            return None
        part = slice(chunk.channel, chunk.channel + chunk.channels)
        for at in pair.new.at:
            low, high = _bounds(pair, (old, new), at, rounded)
            run = min(inner, chunk.count)
            shape = (-1, chunk.channels, run)
            np.maximum(lo[part], low.reshape(shape).max(axis=(0, 2)), out=lo[part])
            np.minimum(hi[part], high.reshape(shape).min(axis=(0, 2)), out=hi[part])
        if (lo[part] > hi[part]).any():
            return None
    for vector in known:
        if len(vector) == n and bool(((lo <= vector) & (vector <= hi)).all()):
            solution = Solution(vector, inner, rounded)
            if not failing(pair, solution).any():
                return solution
    return _settle(pair, Solution(_middle(lo, hi), inner, rounded))


def _settle(pair: Pair, first: Solution) -> Solution | None:
    """`first`, with neighbours where it fails; None where these fail too."""
    vector = first.vector.copy()
    bad = failing(pair, first)
    for step in _STEPS:
        if not bad.any():
            return Solution(vector, first.inner, first.rounded)
        tried = vector.copy()
        tried[bad] = _neighbour(first.vector[bad], step)
        still = failing(pair, Solution(tried, first.inner, first.rounded))
        vector[bad & ~still] = tried[bad & ~still]
        bad &= still
    return None if bad.any() else Solution(vector, first.inner, first.rounded)


def failing(pair: Pair, solution: Solution) -> Array:
    """For every channel whether `solution` misses a bit of it; bool (n,)."""
    n = len(solution.vector)
    bad, work = np.zeros(n, bool), Workspace()
    rule = make_rule(pair.old, pair.new, solution, "")
    for chunk in chunks(pair.new.nbytes // pair.new.stride, n, solution.inner, _RECORDS):
        old, new = pair.read(chunk.first, chunk.count)
        part = slice(chunk.channel, chunk.channel + chunk.channels)
        for at in rule.at:
            raw = numbers(old, rule.dtype, rule.stride, at)
            made = multiply(raw, chunk.first, rule, solution.vector, work)
            bits = f"<u{made.dtype.itemsize}"
            wanted = np.ascontiguousarray(numbers(new, rule.to, rule.made_stride, at)).view(bits)
            shape = (-1, chunk.channels, min(solution.inner, chunk.count))
            bad[part] |= (made.view(bits) != wanted).reshape(shape).any(axis=(0, 2))
    return bad


def _other_bytes_equal(pair: Pair, old: Array, new: Array) -> bool:
    """Whether what lies around the numbers, the codes of a block, is the same."""
    stride, width = pair.new.stride, storage_dtype(pair.new.dtype).itemsize
    if stride == width:
        return True
    same = (old.reshape(-1, stride) == new.reshape(-1, stride)).all(axis=0)
    for at in pair.new.at:
        same[at : at + width] = True
    return bool(same.all())


def _bounds(pair: Pair, blocks: tuple[Array, Array], at: int, rounded: str) -> tuple[Array, Array]:
    """Least and largest factor by which each number at `at` becomes the new one, float64."""
    dtype = pair.new.dtype
    before, raw = (
        np.ascontiguousarray(numbers(block, region.dtype, region.stride, at))
        for block, region in zip(blocks, (pair.old, pair.new), strict=True)
    )
    w, v = to_float(before, pair.old.dtype).astype("<f8"), to_float(raw, dtype).astype("<f8")
    below, above = _rounding_interval(raw, v, dtype, rounded)
    negative_zero = np.signbit(v) & (v == 0)
    below = np.where(v == 0, np.where(negative_zero, below, 0.0), below)
    above = np.where(v == 0, np.where(negative_zero, 0.0, above), above)
    with np.errstate(all="ignore"):
        one, other = below / w, above / w
        lo, hi = np.minimum(one, other), np.maximum(one, other)
        slack = (_TWICE if rounded != dtype or dtype in ("BF16", "F16") else _SLACK) * np.maximum(
            np.abs(lo), np.abs(hi)
        )
        lo, hi = lo - slack, hi + slack
    # a zero only tells signs apart, and what is infinite or no number is left to the check
    unknown = ~np.isfinite(v) | ~np.isfinite(w) | np.isnan(lo) | np.isnan(hi)
    zero = (w == 0) & np.isfinite(v)
    lo[unknown | (w == 0)], hi[unknown | (w == 0)] = -np.inf, np.inf
    same_sign = np.signbit(w) == np.signbit(v)
    lo[zero & same_sign], hi[zero & ~same_sign] = 0.0, 0.0
    lo[zero & (v != 0)] = np.inf
    return lo, hi


def _rounding_interval(raw: Array, values: Array, dtype: str, rounded: str) -> tuple[Array, Array]:
    """Between which numbers lies what rounds to `values`, stored as `raw`; float64."""
    if rounded != dtype:
        with np.errstate(all="ignore"):
            narrow = values.astype("<f8") if dtype == "F64" else values.astype("<f4")
            raw = from_float(narrow.copy(), rounded)
    bits = storage_dtype(rounded).itemsize
    ordinal = raw.view(f"<u{bits}").astype("<u8")
    magnitude = ordinal & np.uint64(2 ** (8 * bits - 1) - 1)
    size = np.abs(values)
    up = _magnitude(magnitude + np.uint64(1), rounded)
    down = np.where(magnitude == 0, -up, _magnitude(np.maximum(magnitude, 1) - np.uint64(1), rounded))
    with np.errstate(all="ignore"):
        inner = size / 2 + down / 2
        outer = np.where(np.isinf(up), size + (size - down) / 2, size / 2 + up / 2)
    sign = np.signbit(values)
    return np.where(sign, -outer, inner), np.where(sign, -inner, outer)


def _magnitude(ordinal: Array, dtype: str) -> Array:
    """The value of the ordinal of a positive number, float64."""
    kind = storage_dtype(dtype)
    raw = ordinal.astype(f"<u{kind.itemsize}").view(kind)
    with np.errstate(all="ignore"):
        return np.array(to_float(raw, dtype), "<f8")


def _middle(lo: Array, hi: Array) -> Array:
    """The float32 nearest the middle of each interval, or inside it; 1 where anything will do."""
    with np.errstate(all="ignore"):
        open_ended = ~np.isfinite(lo) | ~np.isfinite(hi)
        middle = np.where(open_ended, np.clip(1.0, lo, hi), lo / 2 + hi / 2)
        found = middle.astype("<f4")
        for step in _STEPS[:2]:
            outside = (found < lo) | (found > hi)
            tried = _neighbour(middle.astype("<f4"), step)
            take = outside & (tried >= lo) & (tried <= hi)
            found[take] = tried[take]
    found[(lo <= 0) & (hi >= 0) & ~open_ended] = 0.0  # of which sign the check tells
    return found


def _neighbour(values: Array, steps: int) -> Array:
    """float32 `values` so many places up; the other zero for zeros."""
    toward = np.float32(np.inf if steps > 0 else -np.inf)
    found = values
    for _ in range(abs(steps)):
        found = np.nextafter(found, toward)
    return np.where(values == 0, -values, found).astype("<f4")
