"""Quantized initializers beside the tensors they stand for: every code must be within one step of its weight.

ONNX Runtime's quantizers name what they write: ``X_quantized`` with ``X_scale`` and ``X_zero_point`` (8 bits), ``X_Q4`` with
``X_scales`` and ``X_zero_points`` (``MatMulNBits``, ``GatherBlockQuantized``: blocks along the input axis, low nibble first).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ia3_export.fold import Array, to_float
from ia3_export.parity.expected import Expected, Reader, expected_blocks

#: Rounding moves a value by half a step; a zero point that is rounded too moves the ends of a block by up to another half.
_STEPS = 1.01


def code_errors(
    rows: Mapping[str, Expected], initializers: Mapping[str, Any]
) -> Iterator[tuple[str, str, float]]:
    """For every quantized initializer that has a stored tensor's name: its name, the tensor's, and the largest distance in steps.

    `rows` are the tensors of the merged model, by name.
    """
    for name, tensor in initializers.items():
        for ending, read in (("_quantized", _eight_bits), ("_Q4", _four_bits)):
            if not name.endswith(ending):
                continue
            own = name.removesuffix(ending)
            row = next(
                (rows[n] for n in rows if n == own or n.endswith(f".{own}") or own.endswith(f".{n}")), None
            )
            pairs = [] if row is None else read(own, tensor, initializers)
            if row is None or not pairs:
                continue
            weight = _whole(row)
            distances = [d for values, steps in pairs if (d := _distance(weight, values, steps)) is not None]
            if distances:
                yield name, row.name, min(distances)


def within_a_step(error: float) -> bool:
    """Whether rounding to codes explains a distance of so many steps."""
    return error <= _STEPS


def _whole(row: Expected) -> Array:
    with (reader := Reader()).stack:
        parts = [to_float(block.copy(), row.dtype) for block, _ in expected_blocks(row, reader)]
    return np.concatenate([part.reshape(-1) for part in parts]).astype("<f8").reshape(row.source.shape)


def _distance(weight: Array, values: Array, steps: Array) -> float | None:
    """Of `values`, as they are or transposed, from `weight`; None if the shapes do not fit."""
    width = weight.shape[-1] if weight.ndim == 2 else 0
    ways = [(values, steps), (values.T, steps.T)]
    if weight.ndim == 2:  # the last block of a row may be padded
        ways += [(v[:, :width], s[:, :width]) for v, s in ways[:1]]
        ways += [(values[:, : len(weight)].T, steps[:, : len(weight)].T)]
    fitting = [(v, np.where(s == 0, 1.0, s)) for v, s in ways if v.shape == weight.shape]
    distances = [float((np.abs(weight - v) / s).max(initial=0.0)) for v, s in fitting]
    return min(distances, default=None)


def _eight_bits(name: str, tensor: Any, initializers: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    """Values and steps; one pair for each axis along which the scales may lie (a square matrix does not tell)."""
    scale = initializers.get(f"{name}_scale")
    if scale is None:
        return []
    codes, step = tensor.numpy().astype("<f8"), scale.numpy().astype("<f8").reshape(-1)
    zero = initializers.get(f"{name}_zero_point")
    middle = 128.0 if tensor.dtype.name == "UINT8" else 0.0
    offset = np.array([middle]) if zero is None else zero.numpy().astype("<f8").reshape(-1)
    pairs = []
    for axis in {0, codes.ndim - 1}:
        if step.size not in (1, codes.shape[axis]) or offset.size not in (1, codes.shape[axis]):
            continue
        along = [-1 if i == axis else 1 for i in range(codes.ndim)]
        steps = np.broadcast_to(step.reshape(along), codes.shape)
        pairs.append(((codes - offset.reshape(along)) * steps, steps))
    return pairs


def _four_bits(name: str, tensor: Any, initializers: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    scales = initializers.get(f"{name}_scales")
    packed = tensor.numpy()
    if scales is None or packed.ndim != 3:
        return []
    rows, blocks, _ = packed.shape
    codes = _nibbles(packed).reshape(rows, blocks, -1).astype("<f8")
    step = scales.numpy().astype("<f8").reshape(rows, blocks, 1)
    zero = initializers.get(f"{name}_zero_points")
    offset: Any = 8.0
    if zero is not None:
        offset = _nibbles(zero.numpy().reshape(rows, -1)).reshape(rows, -1)[:, :blocks, None].astype("<f8")
    values = ((codes - offset) * step).reshape(rows, -1)
    steps = np.broadcast_to(np.abs(step), codes.shape).reshape(rows, -1)
    return [(values, steps)]


def _nibbles(packed: Array) -> Array:
    unpacked: Array = np.stack((packed & 0x0F, packed >> 4), axis=-1)
    return unpacked
