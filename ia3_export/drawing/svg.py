"""What every chart is made of: axes, labels, coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from markupsafe import Markup


def decades(values: Iterable[float]) -> tuple[int, int]:
    """Powers of ten around all of `values` that have a logarithm."""
    known = [v for v in values if 0 < v < math.inf]
    low = math.floor(math.log10(min(known, default=1e-7)))
    high = math.ceil(math.log10(max(known, default=1.0)))
    return low, max(high, low + 1)


def log_position(low: int, high: int) -> Callable[[float], float]:
    """Place of a number on an axis from 10^`low` to 10^`high`, in percent; NaN lies beyond every bound."""

    def at(value: float) -> float:
        if not value > 0:
            return 0.0 if value == 0 else 100.0
        exponent = math.log10(value) if value < math.inf else high
        return 100 * min(1.0, max(0.0, (exponent - low) / (high - low)))

    return at


def thin_out(count: int, most: int) -> int:
    """The round step at which at most `most` of `count` labels are left."""
    steps = (first * int(10**k) for k in range(12) for first in (1, 2, 5))
    return next(n for n in steps if count / n <= most)


def anchor(x: float) -> str:
    """Which end of a label at `x` percent keeps it inside the chart."""
    return "start" if x < 40 else "end" if x > 60 else "middle"


def digits(value: float) -> str:
    """A coordinate without needless digits."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def draw(kind: str, height: int, label: str, parts: Iterable[Markup]) -> Markup:
    """A chart of `height` pixels and full width; `label` is what a screen reader says."""
    return Markup(
        '<svg class="chart {k}" style="--h:{h}px" role="img" aria-label="{label}">{parts}</svg>'
    ).format(k=kind, h=height, label=label, parts=Markup("").join(parts))
