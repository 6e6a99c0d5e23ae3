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


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A matrix of rows x columns in blocks along its rows: ``(code - middle) * scale + offset``, where the
    middle is ``2 ** (bits - 1)``.

    Attributes:
        packed: uint8 (rows, blocks, block * bits / 8); of two codes in a byte the first is the lower half.
        scales: float32 (rows, blocks).
        offsets: float32 (rows, blocks); None where they are 0.
        bits: 8 or 4.
    """

    packed: Array
    scales: Array
    offsets: Array | None
    bits: int

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


def blocks_of(matrix: Array, block: int) -> Array:
    """A copy of `matrix` as (rows, blocks, block), its last blocks filled up with zeros."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    values = np.zeros((rows, count, block), np.float32)
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
        return Codes(whole, scales, None, 8)
    return Codes(whole[..., ::2] | whole[..., 1::2] << 4, scales, offsets, 4)


def decode(codes: Codes, columns: int) -> Array:
    """The float32 matrix (rows, `columns`) that `codes` stand for."""
    values = codes.packed
    if codes.bits == 4:
        values = np.stack((values & 15, values >> 4), axis=-1)
    exact = values.reshape(*codes.scales.shape, -1).astype(np.float32) - 2 ** (codes.bits - 1)
    exact *= codes.scales[..., None]
    if codes.offsets is not None:
        exact += codes.offsets[..., None]
    decoded: Array = exact.reshape(len(exact), -1)[:, :columns]
    return decoded
