"""Weights as codes of 8 or 4 bits: neighbours in a row of a matrix share a scale.

The layout is that of ONNX Runtime's ``MatMulNBits``:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ia3_export.fold import Array

#: Weights that share a scale: the smallest block of which every runtime has a kernel.
BLOCK = 32


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Codes:
    """A matrix of rows x columns in blocks along its rows: ``(code - zero) * scale + offset``, where the zero
    is ``2 ** (bits - 1)`` unless others are given.

    Attributes:
        packed: uint8 (rows, blocks, block * bits / 8); of two codes in a byte the first is the lower half.
        scales: float32 (rows, blocks).
        offsets: float32 (rows, blocks); None where they are 0.
        bits: 8 or 4.
        zeros: uint8 (rows, blocks * bits / 8, rounded up), packed like the codes; None for the middle.
        order: the column of the matrix that a column of codes is, int64 (columns,); None where they are the
        same.
    """

    packed: Array
    scales: Array
    offsets: Array | None = None
    bits: int
    zeros: Array | None = None
    order: Array | None = None

    @property
    def block(self) -> int:
        """Columns of a block."""
        return int(self.packed.shape[-1]) * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes in a file: offsets have 16 bits there."""
        return (
            self.packed.nbytes
            + self.scales.nbytes
            + (0 if self.offsets is None else self.offsets.nbytes // 2)
        )


def encode(matrix: Array, bits: int, block: int = BLOCK) -> Codes:
    """Codes of a float32 `matrix` (rows, columns), each at most one step from its weight.

    The last block of a row is filled up with zeros. With 8 bits there are no offsets; with 4 bits a block
    reaches from its least to its largest value, as GGUF's Q4_1 does, whose codes are found again. Scales and
    offsets are numbers of float16 where its range allows; scales are rounded up, so that no weight is cut
    off.
    """
    values = blocks_of(matrix, block)
    low, high = values.min(-1), values.max(-1)
    if bits == 8:
        scales, offsets = half_up(np.maximum(high, -low) / np.float32(127)), None
    else:
        scales = half_up((high - low) / np.float32(15))
        offsets = half(low + 8 * scales)
        values -= offsets[..., None]
    values /= scales[..., None]
    values += 2 ** (bits - 1)
    return pack(np.clip(np.rint(values, out=values), 0, 2**bits - 1, out=values), scales, offsets)


def blocks_of(matrix: Array, block: int, dtype: str = "<f4") -> Array:
    """A copy of `matrix` as (rows, blocks, block) of `dtype`, its last blocks filled up with zeros."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    values = np.zeros((rows, count, block), dtype)
    values.reshape(rows, -1)[:, :columns] = matrix
    return values


def half(values: Array) -> Array:
    """`values` rounded to float16, as float32; as they are where one has no float16."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    return np.where(np.isinf(rounded), values, rounded)


def half_up(scales: Array) -> Array:
    """`scales` as float32 that float16 holds, too, none of them smaller; 1 for blocks of equal weights."""
    scales = np.where(scales == 0, np.float32(1), scales)
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
        rounded = np.where(rounded < scales, np.nextafter(rounded, np.float16(np.inf)), rounded)
    wide = rounded.astype(np.float32)
    return np.where(np.isinf(wide), scales, wide)


def pack(codes: Array, scales: Array, offsets: Array | None) -> Codes:
    """`Codes` of whole numbers `codes` (rows, blocks, block): of 4 bits where there are `offsets`."""
    whole = codes.astype(np.uint8)
    if offsets is None:
        return Codes(packed=whole, scales=scales, bits=8)
    return Codes(packed=halves(whole), scales=scales, offsets=offsets, bits=4)


def halves(codes: Array) -> Array:
    """Two of `codes` (uint8 below 16) along the last axis, which is even, in a byte; the first is the lower
    half."""
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed


def decode(codes: Codes, columns: int) -> Array:
    """The float32 matrix (rows, `columns`) that `codes` stand for."""
    exact = _unpacked(codes.packed, codes.bits).reshape(*codes.scales.shape, -1).astype(np.float32)
    if codes.zeros is None:
        exact -= 2 ** (codes.bits - 1)
    else:
        zeros = _unpacked(codes.zeros, codes.bits).reshape(len(exact), -1)
        exact -= zeros[:, : exact.shape[1], None]
    exact *= codes.scales[..., None]
    if codes.offsets is not None:
        exact += codes.offsets[..., None]
    decoded: Array = exact.reshape(len(exact), -1)[:, :columns]
    if codes.order is not None:
        turned = np.empty_like(decoded)
        turned[:, codes.order] = decoded
        return turned
    return decoded


def _unpacked(packed: Array, bits: int) -> Array:
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), axis=-1)
