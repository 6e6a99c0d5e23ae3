"""What a vector does to its channels: which it inhibits, amplifies, or turns over."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from ia3_export.drawing.colours import UNCHANGED
from ia3_export.fold import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Channels by what a vector does to them. A negative channel counts by its magnitude as well."""

    channels: int = 0
    unchanged: int = 0
    inhibited: int = 0
    amplified: int = 0
    negative: int = 0
    not_finite: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def count_channels(values: Array) -> Counts:
    """`values` counted by the one rule: see `UNCHANGED`."""
    finite = values[np.isfinite(values)]
    kinds = kinds_of(finite)
    return Counts(
        channels=values.size,
        unchanged=int(np.sum(unchanged(finite))),
        inhibited=int(np.sum(kinds < 0)),
        amplified=int(np.sum(kinds > 0)),
        negative=int(np.sum(finite < 0)),
        not_finite=values.size - finite.size,
    )


def strongest_channels(vector: Array, most: int = 5) -> tuple[list[int], list[int]]:
    """Indices of the channels that are inhibited most (nearest to 0 first), and of those amplified most."""
    magnitude = np.abs(vector.astype("<f8"))
    order = np.argsort(magnitude, kind="stable")
    inhibited = [int(i) for i in order[:most] if magnitude[i] < 1 - UNCHANGED]
    amplified = [int(i) for i in order[::-1][:most] if magnitude[i] > 1 + UNCHANGED]
    return inhibited, amplified


def kinds_of(vector: Array) -> Array:
    """-1 for channels that are inhibited, 1 for those that are amplified, 0 for the others."""
    magnitude = np.abs(vector)
    return np.asarray((magnitude > 1 + UNCHANGED).astype("i1") - (magnitude < 1 - UNCHANGED).astype("i1"))


def unchanged(values: Array) -> Array:
    """Which channels count as unchanged; none that is negative does."""
    inside: Array = (values >= 1 - UNCHANGED) & (values <= 1 + UNCHANGED)
    return inside


def cosine(a: Array, b: Array) -> float | None:
    """Cosine of the angle between two vectors where both are finite; None where one of them is all zeros."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if not a.any() or not b.any():
        return None
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1, 1))
