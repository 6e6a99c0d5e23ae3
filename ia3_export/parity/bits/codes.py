"""Quantized initializers beside the tensors they stand for: every code must be within one step of its weight.

ONNX Runtime's quantizers name what they write: ``X_quantized`` with ``X_scale`` and ``X_zero_point`` (a scale
for a tensor or a channel), ``X_Q8`` or ``X_Q4`` with ``X_scales`` and ``X_zero_points`` or our ``X_offsets``
(``MatMulNBits``: blocks along the input axis, of two codes in a byte the lower half first), and our
``X_order``, the columns of the weight in the order of those of the codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.fold import Array, to_float
from ia3_export.onnx.kept import ROUNDING, STEPS
from ia3_export.parity.bits.expected import Expected, Reader, expected_blocks, whole

#: Rounding moves a value by half a step; a zero point that is rounded too moves the ends of a block by up to
#: another half.
_STEPS = 1.01
#: Element types that hold codes.
CODES = ("INT8", "UINT8", "INT4", "UINT4")
#: What belongs to codes and is of the same types.
_PARAMETER = re.compile(r"zero_points?_*$|_zp$|_zero$")
_ENDING = re.compile(r"_(quantized|Q4|Q8)_*$")
#: Elements of the first row by which a tensor is looked up before all of it is compared.
_START = 64


@dataclass(frozen=True, slots=True)
class CodeCheck:
    """An initializer of codes, and how many steps (at most) they are from what they stand for.

    `of` is a stored tensor, or the weight of that name in the float32 graph beside. None, with an infinite
    error, where nothing was found to compare them with.
    """

    name: str
    of: str | None
    error: float

    @property
    def within_a_step(self) -> bool:
        """Whether rounding to codes explains the distance."""
        return self.error <= _STEPS

    @property
    def equal(self) -> bool:
        """Whether rounding to float32 explains it: the codes are those that the weight was made of."""
        return self.error <= STEPS


@dataclass(frozen=True, slots=True, eq=False)
class DecodedCodes:
    """What codes stand for, and the length of a step of each.

    Up to `padding` of the last columns belong to no weight.
    """

    values: Array
    steps: Array
    padding: int = 0


def check_codes(
    rows: Mapping[str, Expected],
    initializers: Mapping[str, Any],
    origins: Mapping[str, str],
    float_weight: Callable[[str], Array | None],
) -> Iterator[CodeCheck]:
    """Every initializer of codes beside the weight that it stands for.

    That is the row of `rows` (the tensors of the merged model) of its name, or which `origins` gives for it;
    the `float_weight` of its name in the float32 graph that it was made of; else any row whose values fit.
    """
    for name, tensor in initializers.items():
        if tensor.dtype.name not in CODES or _PARAMETER.search(name) or tensor.size <= 1:
            continue
        own = _ENDING.sub("", name)
        ending = _ENDING.search(name)
        decoded = _READERS[ending[1]](own, tensor, initializers) if ending else []
        row, of, distance = _named(rows, own, origins), None, math.inf
        if decoded and row is not None:
            of, distance = row.name, _nearest(whole(row).astype("<f8"), decoded)
            # a convolution into which the exporter folded a normalization has the name, and other values
            if distance > _STEPS and decoded[0].values.ndim > 2 and (made := float_weight(own)) is not None:
                of, distance = own, _nearest(made.astype("<f8"), decoded)
        elif decoded and (weight := float_weight(own)) is not None:
            of, distance = own, _nearest(weight.astype("<f8"), decoded)
        elif decoded:
            for row in rows.values():
                if _may_be(row, decoded) and (near := _nearest(whole(row).astype("<f8"), decoded)) <= _STEPS:
                    of, distance = row.name, near
                    break
        yield CodeCheck(name, of, distance)


def _named(rows: Mapping[str, Expected], own: str, origins: Mapping[str, str]) -> Expected | None:
    if origins.get(own) in rows:
        return rows[origins[own]]
    return next((rows[n] for n in rows if n == own or n.endswith(f".{own}") or own.endswith(f".{n}")), None)


def _may_be(row: Expected, decoded: Sequence[DecodedCodes]) -> bool:
    """Whether the first elements of `row` are within a step: a look at all of it takes long."""
    ways = [way for one in decoded for way in _ways(row.source.shape, one)]
    if not ways:
        return False
    count = min(_START, row.source.shape[-1])
    with (reader := Reader()).stack:
        start = to_float(next(expected_blocks(row, reader, 0, count))[0].copy(), row.dtype).astype("<f8")
    first = (0,) * (len(row.source.shape) - 1)
    return any((np.abs(start - v[first][:count]) <= _STEPS * s[first][:count]).all() for v, s in ways)


def _nearest(weight: Array, decoded: Sequence[DecodedCodes]) -> float:
    """The distance of the nearest of `decoded` from `weight`, in steps; infinite if no shape fits."""
    ways = [way for one in decoded for way in _ways(weight.shape, one)]
    # float32 holds weights and offsets only so exactly, however short a step is
    spare = ROUNDING * np.abs(weight)
    return min(
        (float((np.maximum(np.abs(weight - v) - spare, 0) / s).max(initial=0.0)) for v, s in ways),
        default=math.inf,
    )


def _ways(shape: tuple[int, ...], decoded: DecodedCodes) -> Iterator[tuple[Array, Array]]:
    """Values and steps in `shape`: as they are or transposed, without the padding of a row's last block."""
    values, steps = decoded.values, np.where(decoded.steps == 0, 1.0, decoded.steps)
    for turned in (False, True):
        wanted = shape[::-1] if turned else shape
        cut = values.shape[-1] - wanted[-1] if len(wanted) == values.ndim else -1
        if 0 <= cut <= decoded.padding and values.shape[:-1] == wanted[:-1]:
            v, s = values[..., : wanted[-1]], steps[..., : wanted[-1]]
            yield (v.T, s.T) if turned else (v, s)


def _eight_bits(name: str, tensor: Any, initializers: Mapping[str, Any]) -> list[DecodedCodes]:
    """One for each axis along which the scales may lie (a square matrix does not tell)."""
    scale = initializers.get(f"{name}_scale")
    if scale is None:
        return []
    codes, step = tensor.numpy().astype("<f8"), scale.numpy().astype("<f8").reshape(-1)
    zero = initializers.get(f"{name}_zero_point")
    middle = 128.0 if tensor.dtype.name == "UINT8" else 0.0
    offset = np.array([middle]) if zero is None else zero.numpy().astype("<f8").reshape(-1)
    found = []
    if scale.numpy().ndim == codes.ndim > 2:  # a matrix for each expert
        steps = np.broadcast_to(scale.numpy().astype("<f8"), codes.shape)
        return [DecodedCodes((codes - offset.reshape(-1)[:1]) * steps, steps)] if offset.size == 1 else []
    for axis in {0, codes.ndim - 1}:
        if step.size not in (1, codes.shape[axis]) or offset.size not in (1, codes.shape[axis]):
            continue
        along = [-1 if i == axis else 1 for i in range(codes.ndim)]
        steps = np.broadcast_to(step.reshape(along), codes.shape)
        found.append(DecodedCodes((codes - offset.reshape(along)) * steps, steps))
    return found


def _in_blocks(name: str, tensor: Any, initializers: Mapping[str, Any]) -> list[DecodedCodes]:
    scales = initializers.get(f"{name}_scales")
    packed = tensor.numpy()
    if scales is None or packed.ndim != 3:
        return []
    rows, blocks, _ = packed.shape
    bits = 4 if tensor.name.rstrip("_").endswith("4") else 8
    codes = _unpacked(packed, bits).reshape(rows, blocks, -1).astype("<f8")
    step = scales.numpy().astype("<f8").reshape(rows, blocks, 1)
    zero = initializers.get(f"{name}_zero_points")
    offset: Any = 2.0 ** (bits - 1)
    if zero is not None:
        offset = _unpacked(zero.numpy().reshape(rows, -1), bits).reshape(rows, -1)
        offset = offset[:, :blocks, None].astype("<f8")
    added = initializers.get(f"{name}_offsets")
    extra: Any = 0.0 if added is None else added.numpy().astype("<f8").reshape(rows, blocks, 1)
    values = ((codes - offset) * step + extra).reshape(rows, -1)
    steps = np.broadcast_to(np.abs(step), codes.shape).reshape(rows, -1)
    order = initializers.get(f"{name}_order")
    if order is None:
        return [DecodedCodes(values, steps, codes.shape[-1] - 1)]
    places = np.argsort(order.numpy())  # where each column of the weight is among those of the codes
    whole = len(places) <= values.shape[1] and np.array_equal(order.numpy()[places], np.arange(len(places)))
    return [DecodedCodes(values[:, places], steps[:, places])] if whole else []


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes of 8 bits as they are, those of 4 bits on an axis of their own: lower half, upper half."""
    return packed if bits == 8 else np.stack((packed & 0x0F, packed >> 4), axis=-1)


_READERS: Mapping[str, Callable[[str, Any, Mapping[str, Any]], list[DecodedCodes]]] = {
    "quantized": _eight_bits,
    "Q4": _in_blocks,
    "Q8": _in_blocks,
}
