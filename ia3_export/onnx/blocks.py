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
    """A matrix of `rows` x columns in blocks along its rows.

    Attributes:
        packed: uint8 (rows, blocks, block * bits / 8); of two codes in a byte the first is the lower half.
        scales: float32 (rows, blocks).
        zeros: uint8 (rows, bytes), the codes that stand for 0, packed alike; None where they all are
            ``2 ** (bits - 1)``.
        bits: 8 or 4.
    """

    packed: Array
    scales: Array
    zeros: Array | None
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def encode(matrix: Array, bits: int, block: int = BLOCK) -> Codes:
    """Codes of a float32 `matrix` (rows, columns), each at most one step from its weight.

    The last block of a row is filled up with zeros. With 8 bits the middle code is 0; with 4 bits a block
    reaches from its least to its largest value. Scales are numbers of float16 where its range allows, rounded
    up, so that no weight is cut off.
    """
    values = blocks_of(matrix, block)
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    if bits == 8:
        scales = half_up(np.maximum(high, -low) / np.float32(127))
        zeros = np.full_like(scales, 128)
    else:
        scales = half_up((high - low) / np.float32(15))
        zeros = np.clip(np.rint(-low / scales), 0, 15)
    values /= scales[..., None]
    values += zeros[..., None]
    codes = np.clip(np.rint(values, out=values), 0, 2**bits - 1, out=values)
    return pack(codes, scales, zeros, bits)


def blocks_of(matrix: Array, block: int) -> Array:
    """A copy of `matrix` as (rows, blocks, block), its last blocks filled up with zeros."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    values = np.zeros((rows, count, block), np.float32)
    values.reshape(rows, -1)[:, :columns] = matrix
    return values


def half_up(scales: Array) -> Array:
    """`scales` as float32 that float16 holds, too, none of them smaller; 1 for blocks of zeros."""
    scales = np.where(scales == 0, np.float32(1), scales)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
        half = np.where(half < scales, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
    return np.where(np.isinf(half), scales, half)


def pack(codes: Array, scales: Array, zeros: Array, bits: int) -> Codes:
    """`Codes` of whole numbers: `codes` (rows, blocks, block), `zeros` (rows, blocks)."""
    if bits == 8:
        return Codes(codes.astype(np.uint8), scales, None, bits)
    return Codes(_halves(codes.astype(np.uint8)), scales, _halves(zeros.astype(np.uint8)), bits)


def decode(codes: Codes, columns: int) -> Array:
    """The float32 matrix (rows, `columns`) that `codes` stand for."""
    values, zeros = codes.packed, np.full((*codes.scales.shape, 1), 2 ** (codes.bits - 1), np.uint8)
    if codes.bits == 4:
        values = np.stack((values & 15, values >> 4), axis=-1)
    if codes.zeros is not None:
        pairs = np.stack((codes.zeros & 15, codes.zeros >> 4), axis=-1).reshape(len(zeros), -1)
        zeros = pairs[:, : zeros.shape[1], None]
    exact = values.reshape(*codes.scales.shape, -1).astype(np.float32) - zeros
    decoded: Array = (exact * codes.scales[..., None]).reshape(len(exact), -1)[:, :columns]
    return decoded


def _halves(codes: Array) -> Array:
    """Pairs of codes along the last axis in one byte each, an odd last one beside 8."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.full_like(codes[..., :1], 8)], axis=-1)
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed
