"""What every tensor of a merged folder must be, and reading that beside what it is, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import (
    FLOAT_DTYPES,
    Array,
    Scale,
    Workspace,
    fold_block,
    storage_dtype,
    to_float,
)
from ia3_export.planning.changes import How
from ia3_export.planning.plan import Plan

#: Bytes that are read and compared at a time.
BLOCK = 1 << 19


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Expected:
    """A tensor as it must be: `scales` folded into `source`, written as `dtype`.

    `how` is the plan's word for a changed tensor, None for one that keeps the base's bytes or values; `base`
    is the base's tensor of the same name, if there is one.
    """

    name: str
    dtype: str
    source: StoredTensor
    scales: tuple[Scale, ...]
    how: How | None
    base: StoredTensor | None

    @property
    def changed(self) -> bool:
        """Whether the merge gives the tensor other values than the base's."""
        return self.how is not None

    @property
    def plain(self) -> bool:
        """Whether the bytes are those of `source`."""
        return not self.scales and self.dtype == self.source.dtype and self.source.computed is None


def expected_tensors(plan: Plan) -> dict[str, Expected]:
    """Every tensor of the output of `plan`, by name."""
    stored = plan.base.stored.tensors
    rows = {
        name: Expected(name=name, dtype=t.dtype, source=t, scales=(), how=None, base=t)
        for name, t in stored.items()
        if name not in plan.dropped
    }
    for name, change in plan.changes.items():
        how = None if change.how in ("cast", "dequantize", "rewrite") else change.how
        base = plan.base.dense.tensors.get(name) or stored.get(name)
        rows[name] = Expected(
            name=name, dtype=change.dtype, source=change.source, scales=change.scales, how=how, base=base
        )
    return rows


class Reader:
    """Open files and buffers of one thread."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.work = Workspace()
        self._files: dict[Path, int] = {}

    def read(self, tensor: StoredTensor, start: int, nbytes: int, use: str) -> Array:
        """Bytes ``start:start+nbytes`` after the beginning of `tensor`, in a buffer called `use`."""
        if tensor.data is not None:
            return tensor.data[start : start + nbytes]
        if tensor.file not in self._files:
            opened = self.stack.enter_context(tensor.file.open("rb", buffering=0))
            self._files[tensor.file] = opened.fileno()
        block = self.work.get(use, nbytes, "u1")
        with ranges.reading(tensor.file, tensor.name):
            ranges.read_into(self._files[tensor.file], block.data, tensor.offset + start)
        return block


def same_block(one: Array, other: Array, work: Workspace) -> bool:
    """Whether two blocks of bytes are equal."""
    whole = len(one) // 8 * 8
    if len(one) != len(other) or one[whole:].tobytes() != other[whole:].tobytes():
        return False
    differs = work.get("differs", whole // 8, "?")
    np.not_equal(one[:whole].view("<u8"), other[:whole].view("<u8"), out=differs)
    return not differs.any()


def expected_blocks(
    row: Expected, reader: Reader, start: int = 0, end: int | None = None
) -> Iterator[tuple[Array, int]]:
    """Elements `start` to `end` of `row` as they must be.

    Stored bits of ``row.dtype`` (bytes for other than floating dtypes), block by block, each with the index
    of its first element and valid until the next.
    """
    floats = row.source.dtype in FLOAT_DTYPES
    stored = storage_dtype(row.source.dtype) if floats else np.dtype("u1")
    total = row.source.nbytes // stored.itemsize
    end = total if end is None else end
    step = BLOCK // max(stored.itemsize, storage_dtype(row.dtype).itemsize if floats else 1)
    first = start
    while first < end:
        # blocks begin and end at whole rows of the scale where a row fits, so that the fold takes
        # its fast way
        if row.source.computed is not None:
            unit = row.source.computed.unit
            begin = first // unit * unit
            length = min(max(step // unit, 1) * unit - (first - begin), end - first)
            raw = row.source.computed.read(
                begin, min(-(-(first - begin + length) // unit) * unit, total - begin)
            )
            raw = raw[first - begin :][:length]
        else:
            length = min(_whole_rows(row.scales, first, step), end - first)
            raw = reader.read(row.source, first * stored.itemsize, length * stored.itemsize, "base").view(
                stored
            )
        if row.plain or not floats:
            yield raw, first
        else:
            yield fold_block(raw, first, row.source.dtype, row.dtype, row.scales, reader.work), first
        first += length


def whole(row: Expected) -> Array:
    """`row` as it must be, float32 (float64 where it is that), in its shape."""
    with (reader := Reader()).stack:
        parts = [to_float(block.copy(), row.dtype).reshape(-1) for block, _ in expected_blocks(row, reader)]
    values: Array = np.concatenate(parts).reshape(row.source.shape)
    return values


def blocks(
    row: Expected, tensor: StoredTensor, reader: Reader, start: int = 0, nbytes: int | None = None
) -> Iterator[tuple[Array, Array, int]]:
    """`expected_blocks`, each beside the bytes that `tensor` has there.

    `start`, `nbytes` are bytes of `tensor`.
    """
    itemsize = storage_dtype(row.dtype).itemsize if row.dtype in FLOAT_DTYPES else 1
    end = (start + (tensor.nbytes if nbytes is None else nbytes)) // itemsize
    for wanted, first in expected_blocks(row, reader, start // itemsize, end):
        yield wanted, reader.read(tensor, first * itemsize, len(wanted) * itemsize, "merged"), first


def _whole_rows(scales: Sequence[Scale], first: int, step: int) -> int:
    unit = max((s.period if s.period <= step else s.inner for s in scales), default=1)
    if unit > step:
        return step
    return (first + step) // unit * unit - first or step


def equal(row: Expected, tensor: StoredTensor) -> bool:
    """Whether `tensor` is bit for bit what `row` says; reads no further than the first difference."""
    reader = Reader()
    with reader.stack:
        return all(
            same_block(wanted.view("u1"), found, reader.work)
            for wanted, found, _ in blocks(row, tensor, reader)
        )
