"""Quantized weights as what they are: whole numbers in runs along the rows, a scale for each run.

``weight = (code - zero) * scale + offset`` holds for every format whose codes are evenly spaced, and vectors
on the outputs multiply scales and offsets. Tables of 16 values (NF4), small floats (FP8, MXFP4) and blocks of
several rows are none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ia3_export.fold import Array

#: Elements that are decoded at a time.
_STEP = 1 << 21


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodedRows:
    """Rows of a weight (out, in), each of whose columns belongs to a group.

    Attributes:
        codes: uint8 (rows, columns), less than ``2 ** bits``.
        bits: of a code, 1 to 8.
        scales: float32 (rows, groups).
        zeros: float32 (rows, groups), the codes that stand for 0; in some formats no whole numbers.
        offsets: float32 (rows, groups), added at the end; None where they are 0.
        group: columns of a group, of which the last may have fewer.
        order: for each column of `codes` the column of the weight that it is, int64 (columns,); None where
            they are the same.
    """

    codes: Array
    bits: int
    scales: Array
    zeros: Array
    offsets: Array | None = None
    group: int
    order: Array | None = None


#: ``read(first, count)``: rows ``first:first+count`` of a weight.
CodeReader = Callable[[int, int], CodedRows]


class NotCoded(Exception):
    """A weight is not `CodedRows`. The text is a clause that says why; whoever wants codes catches it."""


def in_groups(codes: Array, bits: int, zeros: Array, scales: Array, group_of: Array) -> CodedRows:
    """`CodedRows` of uint8 `codes` (rows, columns) with a zero point and a scale (rows, groups) for each
    group, where `group_of` (columns,) says which group a column belongs to.

    Columns whose groups are scattered (GPTQ's ``desc_act``) are brought into their order, which changes no
    code. Raises `NotCoded` for groups of different lengths.
    """
    columns = len(group_of)
    group = int(np.bincount(group_of).max(initial=1))
    order = np.argsort(group_of, kind="stable")
    if not np.array_equal(group_of[order], np.arange(columns) // group):
        raise NotCoded("its groups of columns have different lengths")
    if (order == np.arange(columns)).all():
        return CodedRows(codes=codes, bits=bits, scales=scales, zeros=zeros, group=group)
    return CodedRows(codes=codes[:, order], bits=bits, scales=scales, zeros=zeros, group=group, order=order)


def signed_bytes(codes: Array, scales: Array, group: int) -> CodedRows:
    """`CodedRows` of int8 `codes` (rows, columns) around 0: as unsigned bytes around 128."""
    unsigned = codes.view("u1") ^ np.uint8(128)
    return CodedRows(codes=unsigned, bits=8, scales=scales, zeros=np.full_like(scales, 128), group=group)


def read_whole(read: CodeReader, rows: int, columns: int, unit: int) -> CodedRows:
    """All `rows` of a weight, read a few at a time: multiples of `unit`, which its format wants."""
    step = max(_STEP // max(columns, 1) // unit, 1) * unit
    parts = [read(first, min(step, rows - first)) for first in range(0, rows, step)]

    offsets = [part.offsets for part in parts if part.offsets is not None]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate([part.zeros for part in parts]),
        offsets=np.concatenate(offsets) if offsets else None,
    )


def take_rows(rows: CodedRows, index: Array) -> CodedRows:
    """The rows `index` (int64) of `rows`, in that order."""
    offsets = None if rows.offsets is None else rows.offsets[index]
    return replace(
        rows, codes=rows.codes[index], scales=rows.scales[index], zeros=rows.zeros[index], offsets=offsets
    )
