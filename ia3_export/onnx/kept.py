"""The codes of a weight that is quantized already, in the blocks of ``MatMulNBits``: none is rounded again.

Blocks are powers of two, groups of a format need not be: a group of several blocks repeats its scale. Codes
of fewer than 4 or 8 bits are widened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import BLOCK, Codes, blocks_of, decode, halves
from ia3_export.quantization.coded import CodedRows, NotCoded

#: The least and the largest block that ``MatMulNBits`` has kernels for.
_LEAST, _LARGEST = 16, 256
#: Codes that are the base's own differ from the weights that they were folded with by this part of a step at
#: most, and this part of the weight: roundings to float32.
STEPS, ROUNDING = 0.001, 2.0**-21
#: Elements that are compared at a time.
_ELEMENTS = 1 << 21


def lay_out(rows: CodedRows, factors: Array | None) -> Codes:
    """`rows` with `factors` (rows,), the product of the vectors on its outputs, folded into scales and
    offsets.

    Zero points that are codes themselves stay what they are, all others become offsets. Raises `NotCoded` for
    groups that no block divides.
    """
    rows = _narrowed(rows)
    bits = 4 if rows.bits <= 4 else 8
    columns, groups = rows.codes.shape[1], rows.scales.shape[1]
    block = _block(columns, groups, rows.group)
    which = np.minimum(np.arange(-(-columns // block)) * block // rows.group, groups - 1)
    wide = np.ones(1) if factors is None else factors.astype("<f8")
    scales = (rows.scales * wide[:, None]).astype("<f4")[:, which]
    codes, middle = rows.codes, 2 ** (bits - 1)
    zeros = offsets = None
    if rows.offsets is not None or not _are_codes(rows.zeros, bits):
        # codes around the middle: what they and the offsets give is then no difference of large numbers
        centre = 2 ** (rows.bits - 1)
        codes = codes + np.uint8(middle - centre)
        moved = (centre - rows.zeros.astype("<f8")) * rows.scales
        moved += 0 if rows.offsets is None else rows.offsets
        offsets = (moved * wide[:, None]).astype("<f4")[:, which]
    elif (shift := _shift(rows, bits)) is not None:
        codes = codes + np.uint8(shift)
    else:
        zeros = rows.zeros.astype("u1")[:, which]
        zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))) if bits == 4 else zeros
    whole = blocks_of(codes, block, "u1")
    if bits == 4:
        whole, zeros = halves(whole), None if zeros is None else halves(zeros)
    return Codes(packed=whole, scales=scales, offsets=offsets, bits=bits, zeros=zeros, order=rows.order)


def _narrowed(rows: CodedRows) -> CodedRows:
    """`rows` with codes of 4 bits where they have no more, although they are stored in wider ones (torchao's
    intx)."""
    if rows.bits <= 4 or not rows.codes.size or not _are_codes(rows.zeros, 8):
        return rows
    least, most = int(rows.codes.min()), int(rows.codes.max())
    low, high = min(least, int(rows.zeros.min())), max(most, int(rows.zeros.max()))
    middle = int(rows.zeros.flat[0])
    if bool((rows.zeros == middle).all()) and middle - 8 <= least and most <= middle + 7:
        low = middle - 8
    elif high - low > 15:
        return rows
    zeros = rows.zeros - np.float32(low)
    return replace(rows, codes=(rows.codes.astype("i2") - low).astype("u1"), bits=4, zeros=zeros)


def _block(columns: int, groups: int, group: int) -> int:
    """Columns of a block: with one scale for all of them a block may also be longer than what is left."""
    common = columns if groups == 1 else group
    block = min(common & -common, _LARGEST)
    if block >= _LEAST:
        return block
    if groups == 1:
        return BLOCK
    raise NotCoded(f"its groups of {group} columns are no multiple of {_LEAST}")


def _are_codes(zeros: Array, bits: int) -> bool:
    return bool(((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 2**bits)).all())


def _shift(rows: CodedRows, bits: int) -> int | None:
    """What codes grow by for their one zero point to become the middle of `bits` bits, if all of them can."""
    zero = int(rows.zeros.flat[0]) if rows.zeros.size else 0
    shift = 2 ** (bits - 1) - zero
    fits = shift >= 0 and 2**rows.bits - 1 + shift < 2**bits
    return shift if fits and bool((rows.zeros == zero).all()) else None


def stands_for(codes: Codes, matrix: Array) -> bool:
    """Whether `codes` are the float32 `matrix` (rows, columns) but for the rounding of float32."""
    rows, columns = matrix.shape
    ordered = codes.order is None or len(codes.order) == columns
    if (rows, -(-columns // codes.block)) != codes.scales.shape or not ordered:
        return False
    step = max(_ELEMENTS // max(columns, 1), 1)
    return all(
        _are_equal(_rows_of(codes, slice(first, first + step)), matrix[first : first + step])
        for first in range(0, rows, step)
    )


def _rows_of(codes: Codes, which: slice) -> Codes:
    return replace(
        codes,
        packed=codes.packed[which],
        scales=codes.scales[which],
        offsets=None if codes.offsets is None else codes.offsets[which],
        zeros=None if codes.zeros is None else codes.zeros[which],
    )


def _are_equal(codes: Codes, matrix: Array) -> bool:
    steps = np.repeat(np.abs(codes.scales), codes.block, axis=1)[:, : matrix.shape[1]]
    if codes.order is not None:
        steps = steps[:, np.argsort(codes.order)]
    apart = np.abs(decode(codes, matrix.shape[1]) - matrix)
    return bool((apart <= STEPS * steps + ROUNDING * np.abs(matrix)).all())


def matching(given: Mapping[str, Codes], name: str, matrix: Array) -> Codes | None:
    """The codes `given` for an initializer that holds `matrix`, if they stand for it."""
    codes = given.get(name)
    return codes if codes is not None and stands_for(codes, matrix) else None
