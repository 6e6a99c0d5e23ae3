"""Packed integers and small floating-point formats, as numpy arrays."""

from __future__ import annotations

import numpy as np

from ia3_export.fold import Array


def unpack(words: Array, bits: int, count: int) -> Array:
    """Codes of `bits` bits packed along the last axis of `words` (any unsigned or signed integers), lowest
    bit first.

    (rows, n) → uint8 (rows, count). Codes may cross the words: one continuous stream, as GPTQ's 3-bit files
    and compressed-tensors have it.
    """
    raw = np.ascontiguousarray(words).view("u1").reshape(len(words), -1)
    if bits == 8:
        return raw[:, :count]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype="u1")
        codes = np.empty((*raw.shape, len(shifts)), "u1")
        for i, shift in enumerate(shifts):
            np.right_shift(raw, shift, out=codes[..., i])
        codes &= np.uint8((1 << bits) - 1)
        return codes.reshape(len(raw), -1)[:, :count]
    stream = np.unpackbits(raw, axis=1, bitorder="little", count=count * bits)
    return np.packbits(stream.reshape(len(raw), count, bits), axis=2, bitorder="little")[..., 0]


def unpack_padded(words: Array, bits: int, count: int) -> Array:
    """As `unpack`, for words of 32 bits that hold ``32 // bits`` whole codes each and end in unused bits."""
    each = 32 // bits
    flat = np.ascontiguousarray(words).reshape(-1, 1)
    return unpack(flat, bits, each).reshape(len(words), -1)[:, :count]


def unpack_planes(words: Array, bits: int, count: int) -> Array:
    """As `unpack`, for GPTQModel's ``gptq_p``: of each 32 codes first the low bits, then the higher ones, in
    planes of 8, 4, 2 or 1 bits that together make `bits`."""
    groups = np.ascontiguousarray(words).reshape(-1, bits)
    codes = np.zeros((len(groups), 32), "u1")
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            codes |= unpack(groups[:, low : low + width], width, 32) << np.uint8(low)
            low += width
    return codes.reshape(len(words), -1)[:, :count]


def _small_float(exponent_bits: int, mantissa_bits: int, bias: int, nan_codes: tuple[int, ...]) -> Array:
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    magnitude = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias)
    )
    values = (sign * magnitude).astype("<f4")
    values[list(nan_codes)] = np.nan
    return values


#: Values by code. OCP 8-bit floating point specification 1.0 (E4M3 without infinities), OCP microscaling
#: formats 1.0.
E4M3 = _small_float(4, 3, 7, (0x7F, 0xFF))
E5M2 = _small_float(5, 2, 15, (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF))
E5M2[[0x7C, 0xFC]] = [np.inf, -np.inf]
E2M1 = _small_float(2, 1, 1, ())
with np.errstate(over="ignore"):
    E8M0 = np.ldexp(np.float32(1), np.arange(256) - 127).astype("<f4")
E8M0[255] = np.nan

FLOAT_CODES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}


def code_values(raw: Array, dtype: str) -> Array:
    """One-byte codes as float32: 8-bit floats (``F8_...``) by their table, integers (``I8``) as they are."""
    return FLOAT_CODES[dtype][raw] if dtype in FLOAT_CODES else raw.astype("<f4")


def combine_groups(operation: np.ufunc, values: Array, by_group: Array, group: Array) -> None:
    """``operation(values, by_group[:, group])`` in place: C-ordered values (rows, columns) with one number
    for every group of columns (rows, groups), `group` saying which a column belongs to. Runs of equal length
    are broadcast."""
    rows, columns = values.shape
    groups = by_group.shape[1]
    size = columns // groups
    if groups * size == columns and (group == np.arange(columns) // size).all():
        runs = values.reshape(rows, groups, size)
        operation(runs, by_group[:, :, None], out=runs)
    else:
        operation(values, by_group[:, group], out=values)


def dequantize_groups(codes: Array, zeros: Array, scales: Array, group: Array) -> Array:
    """``(codes - zeros) * scales`` in place: C-ordered float32 codes (rows, columns), a zero point and a
    scale (rows, groups) for every group of columns."""
    combine_groups(np.subtract, codes, zeros, group)
    combine_groups(np.multiply, codes, scales, group)
    return codes
