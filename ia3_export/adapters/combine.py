"""Several adapters at once: the three ways of section 2 of the design.

``product`` folds one vector after the other and so needs nothing from here. ``linear`` is PEFT's
``IA3Model.add_weighted_adapter``: the plain sum of weight times vector, in which a missing vector counts as
zero. ``delta`` adds the changes instead, ``1 + sum w (l - 1)``, in which a missing vector counts as ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ia3_export.fold import Array, round_vector

Combine = Literal["product", "linear", "delta"]


def combine_vectors(
    vectors: Sequence[Array | None], weights: Sequence[float], how: Combine, stored: str
) -> Array:
    """One vector from those of several adapters for one module (None where an adapter has none).

    `stored` is the dtype of the module's weight in the base. ``linear`` has PEFT's bits: its new vector lives in that
    dtype, and is rounded after every addition. ``delta`` is computed in float64 and rounded once, to float32 (float64
    for float64 bases).
    """
    length = next(len(vector) for vector in vectors if vector is not None)
    dtype = np.dtype("<f8" if stored == "F64" else "<f4")
    if how == "linear":
        total: Array = np.zeros(length, dtype)
        for vector, weight in zip(vectors, weights, strict=True):
            if vector is not None:
                total = round_vector(total + vector.astype(dtype) * dtype.type(weight), stored)
        return total
    change = np.zeros(length, "<f8")
    for vector, weight in zip(vectors, weights, strict=True):
        if vector is not None:
            change += weight * (vector.astype("<f8") - 1.0)
    return (1.0 + change).astype(dtype)
