"""What tensors of scales lose when vectors are folded into them."""

from __future__ import annotations

import numpy as np

from ia3_export.fold import Array, from_float, to_float
from ia3_export.quantization.packed import CannotKeep, Packed, ScaleTensor, as_float, read_flat
from ia3_export.words import TORCH_NAMES

#: Largest relative error of a scale: beyond it, it has overflowed, or is subnormal and has lost its bits.
_COARSEST = 2.0**-7
#: That of one rounding to float16 in its normal range.
_HALF = 1.001 * 2.0**-11


def written_scale(scale: ScaleTensor, factors: Array, packed: Packed) -> tuple[str, float]:
    """The dtype in which a tensor of scales of `packed` is written once `factors` (float32) are in it, and
    the largest relative error that makes.

    compressed-tensors reads scales of any floating dtype, so that one a row becomes float32, and those of
    groups float16 (as large as bfloat16, eight times as exact) where they lie in its range. Raises
    `CannotKeep`.
    """
    stored = scale.stored
    if scale.divides and (factors == 0).any():
        raise CannotKeep(f"{stored.name} divides, and the vector holds a zero")
    if stored.dtype == "F32":
        return "F32", 2.0**-24
    values = as_float(read_flat(stored, 0, stored.size), stored.dtype).astype("<f8")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values * np.resize(
            np.repeat(laid_over(scale, factors).astype("<f8"), scale.inner), len(values)
        )
    choices: tuple[str, ...] = (stored.dtype,)
    if packed.method == "compressed-tensors":
        # two more bytes a row are nothing, two more a group are
        choices = ("F32",) if stored.size == packed.shape[0] else ("F16", "F32")
    nonzero = scaled != 0
    for dtype in choices:
        rounded = to_float(from_float(scaled.astype("<f4"), dtype), dtype).astype("<f8")
        error = float(np.abs(rounded[nonzero] / scaled[nonzero] - 1).max(initial=0.0))
        if error <= (_COARSEST if dtype == choices[-1] else _HALF):
            return dtype, error
    raise CannotKeep(
        f"a scale times the vector leaves the range of {TORCH_NAMES[stored.dtype]} (it would be off by "
        f"{error:.1e})"
    )


def laid_over(scale: ScaleTensor, factors: Array) -> Array:
    """What a tensor of scales is multiplied by, one number a factor of its rows (or columns)."""
    return np.float32(1) / factors if scale.divides else factors
