"""The rule of a fold piece: numbers in records times a vector, rounded to nearest even.

The arithmetic is `ia3_export.fold`'s, with one addition that lets any program give the same bits: a product
that is no number becomes the positive quiet NaN without payload (0x7FC00000, 0x7FC0, 0x7E00).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.fold import Array, Scale, Workspace, from_float, scale_values, storage_dtype, to_float
from ia3_export.patching.format import FoldRule


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records ``first:first+count`` of a region, which lie over channels ``channel:channel+channels``."""

    first: int
    count: int
    channel: int
    channels: int


def chunks(records: int, n: int, inner: int, most: int) -> Iterator[Chunk]:
    """`records`, which are whole runs over `n` channels, in portions of `most` at most that a reshape to
    (runs, channels, records of one) fits: only these are multiplied fast."""
    period = n * inner
    if period <= most:
        step = most // period * period
        for first in range(0, records, step):
            yield Chunk(first, min(step, records - first), 0, n)
        return
    if inner <= most:
        for start in range(0, records, period):
            step = most // inner
            for channel in range(0, n, step):
                some = min(step, n - channel)
                yield Chunk(start + channel * inner, some * inner, channel, some)
        return
    for run in range(records // inner):
        for start in range(0, inner, most):
            yield Chunk(run * inner + start, min(most, inner - start), run % n, 1)


def numbers(block: bytearray | memoryview | Array, dtype: str, stride: int, at: int) -> Array:
    """The numbers at byte `at` of every record in `block`, as a view (records,) of their stored bits."""
    return np.ndarray((len(block) // stride,), storage_dtype(dtype), block, at, (stride,))


def multiply(raw: Array, first: int, rule: FoldRule, vector: Array, work: Workspace) -> Array:
    """The stored bits `raw` of the records from `first` on, times `vector`.

    `vector` is float32; float64 numbers are multiplied in float64. The result is valid until `work` is used
    again.
    """
    values = to_float(np.ascontiguousarray(raw), rule.dtype, work)
    scale_values(values, first, Scale(vector.astype(values.dtype, copy=False), rule.inner))
    unknown = np.isnan(values)
    if unknown.any():
        values[unknown] = np.nan
    if rule.rounded != rule.to:
        values = to_float(from_float(values, rule.rounded), rule.rounded)
        values = values.astype("<f8") if rule.to == "F64" else values
    return from_float(values, rule.to, work, may_carry=False)


def fold_records(
    block: bytearray, first: int, rule: FoldRule, vector: Array, work: Workspace
) -> bytearray | bytes:
    """What `rule` makes of `block`: whole records, of which the first is record `first` of the piece.

    `block` itself, changed, where old and new numbers are as wide.
    """
    for at in rule.at:
        raw = numbers(block, rule.dtype, rule.stride, at)
        if rule.made_stride != rule.stride:
            return bytes(multiply(raw, first, rule, vector, work).tobytes())
        made: Any = numbers(block, rule.to, rule.stride, at)
        made[...] = multiply(raw, first, rule, vector, work)
    return block
