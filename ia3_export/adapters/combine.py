"""Several adapters as one vector a module.

``product`` multiplies them, which a merge does one after the other. ``linear`` is PEFT's
``IA3Model.add_weighted_adapter``: the plain sum of weight times vector, in which a missing vector counts as
zero. ``delta`` adds the changes instead, ``1 + sum w (l - 1)``, in which a missing vector counts as ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import StoredTensor, same_bytes
from ia3_export.errors import NotFinite, Refused, ShapeMismatch
from ia3_export.fold import Array, round_vector
from ia3_export.words import Combine


def combine_vectors(
    vectors: Sequence[Array | None], weights: Sequence[float], combine: Combine, stored: str
) -> Array:
    """One vector from those of several adapters for one module (None where an adapter has none).

    `stored` is the dtype of the module's weight in the base, or without a base that of the
    vectors. ``linear`` has PEFT's bits: its new vector lives in that dtype, and is rounded after
    every addition. ``delta`` and ``product`` are computed in float64 and rounded once, to float32
    (float64 for float64 bases).
    """
    length = next(len(vector) for vector in vectors if vector is not None)
    dtype = np.dtype("<f8" if stored == "F64" else "<f4")
    if combine == "linear":
        total: Array = np.zeros(length, dtype)
        for vector, weight in zip(vectors, weights, strict=True):
            if vector is not None:
                total = round_vector(total + vector.astype(dtype) * dtype.type(weight), stored)
        return total
    if combine == "product":
        factors: Array = np.ones(length, "<f8")
        for vector in vectors:
            if vector is not None:
                factors *= vector.astype("<f8")
        return factors.astype(dtype)
    change = np.zeros(length, "<f8")
    for vector, weight in zip(vectors, weights, strict=True):
        if vector is not None:
            change += weight * (vector.astype("<f8") - 1.0)
    return (1.0 + change).astype(dtype)


def linear_warnings(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[str]:
    """Warnings of what PEFT's sum does without a word.

    It scales everything where the weights do not sum to one, and a vector that an adapter has not got counts
    as zeros, not as ones.
    """
    found = []
    if abs(sum(weights) - 1.0) > 1e-6:
        found.append(
            f"--combine linear: the weights sum to {sum(weights):g}, so every combined vector is scaled by "
            "that, also where the adapters change nothing; delta does not"
        )
    everywhere = {key for adapter in adapters for key in adapter.sites}
    for adapter in adapters:
        missing = sorted(everywhere - adapter.sites.keys())
        if missing:
            found.append(
                f"--combine linear: {adapter.name} has no vector for {len(missing)} modules of the others, "
                f"first {missing[0]}; as in PEFT it counts as zeros there, which takes its weight from the "
                "sum; delta counts ones"
            )
    return found


def combine_sites(adapters: Sequence[Adapter], weights: Sequence[float], combine: Combine) -> dict[str, Site]:
    """The combined vector of every module, float32 (float64 where one of them is).

    Raises `Refused` when adapters scale different sides of a module, `ShapeMismatch`, and `NotFinite`.
    """
    combined: dict[str, Site] = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.sites):
        present = [adapter.sites[key] for adapter in adapters if key in adapter.sites]
        first = present[0]
        for other in present[1:]:
            if other.direction != first.direction:
                raise Refused(
                    f"one adapter scales the input of {first.module}, another its output",
                    hint="an adapter holds one of them; merge the adapters one after the other instead",
                )
            if len(other.vector) != len(first.vector):
                raise ShapeMismatch(
                    f"the vectors of {first.module} have {len(first.vector):,} and "
                    f"{len(other.vector):,} elements",
                    hint="the adapters were trained on different base models",
                )
        dtype = "F64" if any(site.dtype == "F64" for site in present) else "F32"
        vectors = [adapter.sites[key].vector if key in adapter.sites else None for adapter in adapters]
        shape = max((site.shape for site in present), key=len)
        with np.errstate(over="ignore", invalid="ignore"):
            vector = combine_vectors(vectors, weights, combine, dtype)
        if not np.isfinite(vector).all():
            raise NotFinite(
                f"the combined vector of {first.module} does not fit {dtype} at element "
                f"{int(np.argmin(np.isfinite(vector)))}",
                hint="the adapters' vectors are too large for each other; look at them with "
                "ia3-export inspect",
            )
        combined[key] = Site(first.module, first.direction, vector, shape, dtype)
    return combined


def combine_extras(adapters: Sequence[Adapter]) -> Mapping[str, StoredTensor]:
    """Heads and embeddings of all adapters. Raises `Refused` where two bring different ones."""
    extras: dict[str, StoredTensor] = {}
    for adapter in adapters:
        for name, tensor in adapter.extras.items():
            if name in extras and not same_bytes(extras[name], tensor):
                raise Refused(
                    f"two adapters bring {name}, and they differ",
                    hint="a head cannot be combined; leave it out of all adapters but one",
                )
            extras.setdefault(name, tensor)
    return extras
