"""The arithmetic of folding IA3 vectors into tensors, on plain numpy arrays.

(IA)3 multiplies activations by a learned vector (Liu et al. 2022, arXiv:2205.05638, section 3.3). On the
output of ``y = W x + b`` it scales rows of ``W`` and ``b``; on the input it scales columns of ``W`` only.
In memory both are the same thing: a C-ordered tensor in which every run of ``inner`` elements shares one
factor, and the factors repeat with period ``len(factors) * inner``. That one rule, :class:`Scale`, covers
Linear, Conv1D, convolutions with groups and slices of fused expert parameters.

Bits: PEFT's ``merge_and_unload`` computes ``round_to_dtype(f32(W) * f32(l))``, once per adapter, in float64
for float64 bases; so does :func:`fold_block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Direction = Literal["out", "in"]
Layout = Literal["linear", "conv1d", "conv"]

#: Bits per element of every dtype of the safetensors format (its specification, and ``safetensors`` 0.8).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

#: The dtypes that a vector can be folded into.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_STORAGE: dict[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BITS: dict[str, tuple[str, int, int]] = {  # unsigned view, mask without the sign, bits of infinity
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """One vector laid over a whole C-ordered tensor.

    ``factors`` is 1-D, float32 (float64 for float64 tensors); ``inner`` consecutive elements share a factor,
    and the factors repeat until the tensor ends.
    """

    factors: Array
    inner: int

    @property
    def period(self) -> int:
        """Elements after which the factors repeat."""
        return len(self.factors) * self.inner

    def axis(self, shape: Sequence[int]) -> int | None:
        """The axis of a tensor of `shape` along which every index has its own factor; None where there is no
        such axis."""
        for axis, extent in enumerate(shape):
            if len(self.factors) == extent and self.inner == prod(shape[axis + 1 :]):
                return axis
        return None


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds the bits of `dtype`; bfloat16 is kept as its 16 bits."""
    return np.dtype(_STORAGE[dtype])


def work_dtype(stored: str, written: str) -> str:
    """The dtype rounded to after every adapter: the stored one, or the narrowest that holds both."""
    if stored == written:
        return stored
    if "F64" in (stored, written):
        return "F64"
    return "F32"


class Workspace:
    """Buffers that :func:`fold_block` and :func:`check_block` reuse, one set a thread.

    Fresh arrays for every block would be mapped, cleared and unmapped by the kernel each time, which costs
    more than the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Array] = {}

    def get(self, use: str, count: int, dtype: str) -> Array:
        """An array of `count` elements; a second call with the same `use` and `dtype` overwrites it."""
        buffer = self._buffers.get((use, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[use, dtype] = np.empty(count, dtype)
        return buffer[:count]


def to_float(raw: Array, dtype: str, work: Workspace | None = None) -> Array:
    """Widen the stored bits `raw` exactly to float32 (float64 stays float64)."""
    work = work or Workspace()
    if dtype == "BF16":
        wide = work.get("wide", len(raw), "<u4")
        np.left_shift(raw, np.uint32(16), out=wide, dtype="<u4", casting="unsafe")
        return wide.view("<f4")
    values = work.get("values", len(raw), "<f8" if dtype == "F64" else "<f4")
    np.copyto(values, raw)
    return values


def from_float(values: Array, dtype: str, work: Workspace | None = None, *, may_carry: bool = True) -> Array:
    """Round float32 or float64 `values` to `dtype`, to nearest even; returns the stored bits.

    Uses `values` as scratch space. `may_carry` may be false when every NaN among `values` has 16 low zero
    bits, as the product of a bfloat16 NaN has: rounding it up then cannot overflow.
    """
    work = work or Workspace()
    if dtype == "BF16":
        if values.dtype != np.dtype("<f4"):
            values = _to_odd_float32(values)
        bits = values.view("<u4")
        if may_carry:
            not_a_number = np.isnan(values, out=work.get("nan", len(values), "?"))
            if not_a_number.any():  # the addition below would carry a NaN's bits over into a zero
                bits[not_a_number] = 0x7FC0_0000
        lsb = np.right_shift(bits, 16, out=work.get("lsb", len(bits), "<u4"))
        lsb &= 1
        lsb += 0x7FFF
        bits += lsb
        narrow = work.get("narrow", len(bits), "<u2")
        np.copyto(narrow, bits.view("<u2")[1::2])
        return narrow
    if values.dtype == np.dtype(_STORAGE[dtype]):
        return values
    narrow = work.get("narrow", len(values), _STORAGE[dtype])
    with np.errstate(over="ignore", under="ignore"):
        np.copyto(narrow, values, casting="unsafe")
    return narrow


def round_values(values: Array, dtype: str, work: Workspace | None = None) -> None:
    """Round float32 `values` in place to numbers that `dtype` has, to nearest even.

    NaNs must have 16 low zero bits, as in `from_float` without `may_carry`.
    """
    work = work or Workspace()
    if dtype == "BF16":
        bits = values.view("<u4")
        lsb = np.right_shift(bits, 16, out=work.get("lsb", len(bits), "<u4"))
        lsb &= 1
        lsb += 0x7FFF
        bits += lsb
        bits &= 0xFFFF_0000
    elif dtype == "F16":
        np.copyto(values, from_float(values, dtype, work, may_carry=False))


def _to_odd_float32(values: Array) -> Array:
    """float64 to float32, rounded to odd: a second rounding to bfloat16 then gives what one rounding
    would."""
    with np.errstate(over="ignore", under="ignore"):
        nearest = values.astype("<f4")
    bits = nearest.view("<u4")
    even_neighbour = (nearest.astype("<f8") != values) & (bits & 1 == 0) & ~np.isnan(values)
    too_large = np.abs(nearest.astype("<f8")) > np.abs(values)
    bits[even_neighbour & too_large] -= 1
    bits[even_neighbour & ~too_large] += 1
    return nearest


def round_vector(vector: Array, dtype: str) -> Array:
    """`vector` rounded to `dtype` and widened again: what PEFT's low-memory loading makes of it."""
    wide = np.array(vector, dtype="<f8" if dtype == "F64" else "<f4")
    return to_float(from_float(wide, dtype), dtype)


def make_scale(vector: Array, shape: Sequence[int], direction: Direction, layout: Layout) -> Scale:
    """Lay an IA3 `vector` (n,) over a stored weight or bias of `shape`.

    `layout` says how the weight is stored: ``linear`` (out, in), ``conv1d`` (in, out), ``conv``
    (out, in / groups, ...). A 1-D `shape` is a bias and takes output vectors only. The caller has checked
    the lengths.
    """
    axis = 0 if direction == "out" else 1
    if len(shape) == 1:
        axis = 0
    elif layout == "conv1d":
        axis = 1 - axis
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    if layout == "conv" and direction == "in" and len(vector) != shape[1]:
        groups = len(vector) // shape[1]
        per_group = vector.reshape(groups, 1, shape[1])
        vector = np.repeat(per_group, shape[0] // groups, axis=1).reshape(-1)
    return Scale(np.ascontiguousarray(vector), inner)


def scale_values(values: Array, first: int, scale: Scale) -> None:
    """Multiply `values`, elements ``first:first+len(values)`` of a tensor, by `scale`, in place.

    Blocks of whole periods, and blocks of whole rows inside one period, take the fast ways.
    """
    n, inner, period = len(scale.factors), scale.inner, scale.period
    start = first % period
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if start == 0 and len(values) % period == 0:
            periods = values.reshape(-1, n, inner)
            np.multiply(periods, scale.factors[None, :, None], out=periods)
        elif start % inner == 0 and len(values) % inner == 0 and start + len(values) <= period:
            rows = values.reshape(-1, inner)
            row = start // inner
            np.multiply(rows, scale.factors[row : row + len(rows), None], out=rows)
        else:
            index = np.arange(start, start + len(values)) // inner % n
            np.multiply(values, scale.factors[index], out=values)


def fold_block(
    raw: Array, first: int, stored: str, written: str, scales: Sequence[Scale], work: Workspace | None = None
) -> Array:
    """Fold `scales` one after the other into `raw`, elements ``first:first+len(raw)`` of a tensor.

    `raw` holds the stored bits (:func:`storage_dtype`) and is left alone; the result holds the bits of dtype
    `written` and is valid until `work` is used again. Between two scales the values are rounded to
    :func:`work_dtype`, as PEFT rounds after every adapter.
    """
    work = work or Workspace()
    between = work_dtype(stored, written)
    values = to_float(raw, stored, work)
    if between == "F64" and stored != "F64":
        values = values.astype("<f8")
    for i, scale in enumerate(scales):
        if i and between in ("F16", "BF16"):
            values = to_float(from_float(values, between, work, may_carry=False), between, work)
        scale_values(values, first, scale)
    return from_float(values, written, work, may_carry=stored != "BF16")


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """What :func:`check_block` found: index of the first NaN or infinity (or -1), number of zeros."""

    not_finite: int
    zeros: int


def check_block(raw: Array, dtype: str, work: Workspace | None = None) -> BlockCheck:
    """Look for NaN, infinity and zeros (of either sign) in stored bits."""
    work = work or Workspace()
    view, mask, infinity = _BITS[dtype]
    magnitude = work.get("magnitude", len(raw), view)
    np.bitwise_and(raw.view(view), np.dtype(view).type(mask), out=magnitude)
    bad = -1
    if len(magnitude) and magnitude.max() >= infinity:
        bad = int(np.argmax(magnitude >= infinity))
    return BlockCheck(bad, len(magnitude) - int(np.count_nonzero(magnitude)))


def count_zeros(raw: Array, dtype: str, work: Workspace) -> int:
    """Zeros (of either sign) among stored bits."""
    if dtype in ("F32", "F64"):
        return len(raw) - int(np.count_nonzero(raw))
    return check_block(raw, dtype, work).zeros
