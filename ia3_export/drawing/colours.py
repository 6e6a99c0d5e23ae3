"""The diverging scale of colours for factors: blue below one, grey at one, orange above."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ia3_export.fold import Array

#: A channel whose factor is this near to one counts as unchanged, a magnitude below as inhibited, above as
#: amplified.
UNCHANGED = 0.01
#: Codes of `ColourScale.codes` beyond those of every scale: the sign flips, and there is no number.
NEGATIVE, NOT_FINITE = 7, 8

_NEUTRAL = math.log2(1 + UNCHANGED)


@dataclass(frozen=True, slots=True)
class ColourScale:
    """`levels` (at most 6) colours on each side of one, evenly spaced in log2.

    `limit` is the log2 from which a factor has the strongest.
    """

    levels: int
    limit: float

    def codes(self, factors: Array) -> Array:
        """Colours of `factors` (float64), as int of the same shape.

        0 up to 1 + `UNCHANGED` and down to its inverse, from there to `levels` above and -`levels` below; or
        `NEGATIVE`, `NOT_FINITE`.
        """
        with np.errstate(all="ignore"):
            log = np.log2(np.abs(factors))
            level = np.ceil((np.abs(log) - _NEUTRAL) / (self.limit - _NEUTRAL) * self.levels)
            codes = np.sign(log) * np.clip(level, 0, self.levels)
        codes = np.where(factors < 0, NEGATIVE, codes)
        every: Array = np.where(np.isfinite(factors), codes, NOT_FINITE).astype(int)
        return every

    def edges(self) -> list[float]:
        """Factors above one at which the colour changes: `levels` of them, the first 1 + `UNCHANGED`."""
        return [2.0 ** (_NEUTRAL + (self.limit - _NEUTRAL) * k / self.levels) for k in range(self.levels)]


def css_class(code: int) -> str:
    """The style sheet's name of a colour: ``i1`` (below one) or ``a1`` and on, ``zero``, ``neg``, ``nan``."""
    if code in (0, NEGATIVE, NOT_FINITE):
        return {0: "zero", NEGATIVE: "neg", NOT_FINITE: "nan"}[code]
    return f"{'i' if code < 0 else 'a'}{abs(code)}"


def runs(codes: Array, y: str) -> Markup:
    """A row of cells of width 1 at height `y` as one SVG path per colour. Cells of code 0 are not painted."""
    if not len(codes):
        return Markup()
    paths: dict[int, list[str]] = {}
    starts = np.flatnonzero(np.diff(codes, prepend=99))
    for start, end in zip(starts, [*starts[1:], len(codes)], strict=True):
        paths.setdefault(int(codes[start]), []).append(f"M{start} {y}h{end - start}")
    parts = (
        Markup('<path class="{}" d="{}"/>').format(css_class(c), "".join(d)) for c, d in paths.items() if c
    )
    return Markup("").join(parts)
