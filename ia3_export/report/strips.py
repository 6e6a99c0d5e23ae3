"""Learned vectors as strips of colour: which channels are amplified, which inhibited."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from markupsafe import Markup

from ia3_export.drawing.colours import NEGATIVE, NOT_FINITE, ColourScale, css_class, runs
from ia3_export.drawing.formats import clean, number
from ia3_export.report.model import SiteSummary

_LEVELS = 4


def colour_scale(sites: Iterable[SiteSummary]) -> ColourScale:
    """The scale of which 98 of 100 shown values stay below the strongest colour."""
    ratios = sorted(abs(math.log2(abs(v))) for site in sites for v in site.values if v and math.isfinite(v))
    return ColourScale(
        _LEVELS, max(ratios[int(0.98 * (len(ratios) - 1))] if ratios else 0.0, math.log2(1.05))
    )


def strip(site: SiteSummary, scale: ColourScale) -> Markup:
    """One row of colours, a cell a value: blue below 1, orange above, ``neg`` where the sign flips."""
    codes = scale.codes(np.array(site.values))
    codes[codes == NOT_FINITE] = NEGATIVE
    text = (
        f"{clean(site.module)}: min {number(site.minimum)}, mean {number(site.mean)}, "
        f"max {number(site.maximum)}; of {site.size:,} channels {site.amplified:,} amplified, "
        f"{site.inhibited:,} inhibited, {site.negative:,} negative"
    )
    return Markup(
        '<svg class="strip" role="img" aria-label="{text}" viewBox="0 0 {n} 1" preserveAspectRatio="none">'
        '<title>{text}</title><rect class="zero" width="{n}" height="1"/>{paths}</svg>'
    ).format(text=text, n=max(1, len(codes)), paths=runs(codes, ".5"))


def legend(scale: ColourScale) -> list[tuple[str, str]]:
    """Class and meaning of every colour of `strip`, from most inhibited to most amplified, then ``neg``."""
    edges = list(enumerate(scale.edges(), 1))
    down = [(css_class(-k), f"below \u00d7 {number(1 / edge)}") for k, edge in reversed(edges)]
    up = [(css_class(k), f"above \u00d7 {number(edge)}") for k, edge in edges]
    return [*down, ("zero", "within 1 % of 1"), *up, ("neg", "negative: flips the sign")]
