"""The numbers behind a picture of IA3 vectors: what is counted, and how a vector becomes a strip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ia3_export.drawing.colours import ColourScale
from ia3_export.drawing.formats import number
from ia3_export.fold import Array
from ia3_export.vectors.channels import cosine, count_channels, unchanged
from ia3_export.vectors.picture import Difference, Histogram, Strip

#: Colours on each side of 1.
LEVELS = 6

_BARS = 64


def make_strip(vector: Array, bins: int) -> Strip:
    """`vector` (1-D) as at most `bins` values and its numbers."""
    values = vector.astype(np.float64)
    finite = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        mean = float(finite.mean()) if finite.size else math.nan
        from_ones = float(np.sqrt(np.mean((finite - 1) ** 2))) if finite.size else math.nan
    strength = _strength(values)
    first = np.argsort(-strength, kind="stable")[:3]
    count = min(bins, values.size)
    stretches = np.array_split(np.arange(values.size), count) if count else []
    ordered = np.array([values[part[np.argmax(strength[part])]] for part in stretches])
    places = np.rint(np.linspace(0, values.size - 1, count)).astype(int)
    return Strip(
        counts=count_channels(values),
        low=float(finite.min()) if finite.size else math.nan,
        mean=mean,
        high=float(finite.max()) if finite.size else math.nan,
        from_ones=from_ones,
        strongest=tuple((int(i), float(values[i])) for i in first),
        ordered=ordered,
        ranked=np.sort(values)[places],
    )


def make_difference(first: Array, second: Array, bins: int) -> Difference:
    """`second` beside `first`, of one length; a channel that is zero in both has ratio 1."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(all="ignore"):
        ratio = np.where(a == b, 1.0, b / a)
        apart = (
            float(np.sqrt(np.mean((b - a)[np.isfinite(b - a)] ** 2)))
            if np.isfinite(b - a).any()
            else math.nan
        )
    return Difference(make_strip(ratio, bins), cosine(a - 1, b - 1), apart)


def colours(values: Array, scale: ColourScale) -> Array:
    """Codes of the colours of `values` (see `ColourScale.codes`).

    What counts as unchanged is grey: 0.99 too, which is farther from 1 in log2 than 1.01.
    """
    codes = scale.codes(values)
    codes[unchanged(values)] = 0
    return codes


def percent(part: int, whole: int) -> str:
    """`part` of `whole`; what is neither none nor all is not rounded to either."""
    if not whole or part in (0, whole):
        return "100\u00a0%" if whole and part else "0\u00a0%"
    rounded = round(100 * part / whole)
    return (
        f"{rounded}\u00a0%" if 1 <= rounded <= 99 else "under 1\u00a0%" if rounded < 1 else "over 99\u00a0%"
    )


def shown(value: float | None) -> str:
    """`value` to 3 significant digits with a true minus sign; ``—`` where there is none."""
    return number(None if value is None or math.isnan(value) else value).replace("-", "\u2212")


def channel_list(strip: Strip) -> str:
    """The strongest channels of `strip` with their values: ``[12] 0.358, [77] 1.91``."""
    return ", ".join(f"[{i}] {number(value)}" for i, value in strip.strongest).replace("-", "\u2212")


def agreement(cosine: float | None) -> str:
    """A cosine to 3 decimals; what is neither 1 nor -1 is not rounded to it."""
    if cosine is None:
        return "—"
    text = f"{cosine:.3f}" if abs(cosine) <= 0.9995 or abs(cosine) == 1 else f"{cosine:.6f}"
    return text.replace("-0.000", "0.000").replace("-", "\u2212")


def factor_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round factors between two log2 with their labels, for an axis: few, 1 among them."""
    if high - low > 3:
        return [
            (2.0**n, f"\u00d7{2**n}" if n >= 0 else f"\u00d71/{2**-n}")
            for n in range(math.ceil(low), math.floor(high) + 1)
        ]
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5):
        ticks = [
            n * step for n in range(math.ceil(2**low / step - 1e-9), math.floor(2**high / step + 1e-9) + 1)
        ]
        if len(ticks) <= 11:
            break
    return [(tick, f"\u00d7{tick:.3g}") for tick in ticks if tick > 0]


def _strength(values: Array) -> Array:
    """How far from 1 each channel is, in log2; a flipped sign and what is not finite exceed all others."""
    with np.errstate(all="ignore"):
        log = np.minimum(np.abs(np.log2(np.abs(values))), 5000.0)
    strength: Array = np.where(np.isfinite(values), log + 10_000.0 * (values < 0), 20_000.0)
    return strength


def magnitudes_of(vectors: Sequence[Array]) -> Array:
    """log2 of the magnitude of every finite channel; zero has -1075, below every float64."""
    values = np.concatenate([np.zeros(0), *(vector.astype(np.float64) for vector in vectors)])
    with np.errstate(divide="ignore"):
        log: Array = np.log2(np.abs(values[np.isfinite(values)]))
    return log.clip(-1075.0)


def colour_scale(magnitudes: Sequence[Array]) -> ColourScale:
    """The scale of which 99 of 100 channels stay below the strongest colour.

    `magnitudes` are log2, an array per adapter.
    """
    every = np.abs(np.concatenate(magnitudes))
    at = float(np.quantile(every, 0.99)) if every.size else 0.0
    return ColourScale(LEVELS, min(4.0, max(math.log2(1.05), at)))


def histogram_of(magnitudes: Sequence[Array]) -> Histogram:
    """`magnitudes` (log2, an array per adapter) in at most 65 bins, from 1/16 to 16 at the farthest."""
    every = np.concatenate(magnitudes)
    low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 0.0)
    low, high = max(-4.0, min(-0.1, low)), min(4.0, max(0.1, high))
    step = next(s for s in (1 / 64, 1 / 32, 1 / 16, 1 / 8) if high - low <= _BARS * s)
    edges = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
    # what lies outside goes into the end bins
    inside = [np.clip(m, edges[0], edges[-1]) for m in magnitudes]
    return Histogram(edges, tuple(np.histogram(m, edges)[0] for m in inside))
