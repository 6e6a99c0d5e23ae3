"""Learned vectors as strips of colour: which channels are amplified, which inhibited."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

from ia3_export.report.formats import clean, number
from ia3_export.report.model import SiteSummary

_LEVELS = 4
_NEUTRAL = math.log2(1.01)


def heat_limit(sites: Iterable[SiteSummary]) -> float:
    """Factor from which a channel gets the strongest colour: 98 of 100 shown values are nearer to 1."""
    ratios = sorted(abs(math.log2(abs(v))) for site in sites for v in site.values if v and math.isfinite(v))
    return float(2.0 ** max(ratios[int(0.98 * (len(ratios) - 1))] if ratios else 0.0, math.log2(1.05)))


def strip(site: SiteSummary, limit: float) -> Markup:
    """One row of colours, a cell a value: blue below 1, orange above, ``neg`` where the sign flips."""
    runs: dict[str, list[str]] = {}
    start = 0
    kinds = [_heat(v, limit) for v in site.values]
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            runs.setdefault(kinds[start], []).append(f"M{start} .5h{i - start}")
            start = i
    text = (
        f"{clean(site.module)}: min {number(site.minimum)}, mean {number(site.mean)}, max {number(site.maximum)}; "
        f"of {site.size:,} channels {site.amplified:,} amplified, {site.inhibited:,} inhibited, "
        f"{site.negative:,} negative"
    )
    paths = (Markup('<path class="{}" d="{}"/>').format(kind, "".join(d)) for kind, d in runs.items() if kind)
    return Markup(
        '<svg class="strip" role="img" aria-label="{text}" viewBox="0 0 {n} 1" preserveAspectRatio="none">'
        '<title>{text}</title><rect class="zero" width="{n}" height="1"/>{paths}</svg>'
    ).format(text=text, n=max(1, len(kinds)), paths=Markup("").join(paths))


def heat_legend(limit: float) -> list[tuple[str, str]]:
    """Class and meaning of every colour of `strip`, from most inhibited to most amplified, then ``neg``."""
    step = (math.log2(limit) - _NEUTRAL) / _LEVELS
    edges = [2.0 ** (_NEUTRAL + step * k) for k in range(_LEVELS)]
    down = [(f"i{k + 1}", f"below \u00d7 {number(1 / edges[k])}") for k in reversed(range(_LEVELS))]
    up = [(f"a{k + 1}", f"above \u00d7 {number(edges[k])}") for k in range(_LEVELS)]
    return [*down, ("zero", "within 1 % of 1"), *up, ("neg", "negative: flips the sign")]


def _heat(value: float, limit: float) -> str:
    if value < 0 or not math.isfinite(value):
        return "neg"
    ratio = math.log2(value) if value else -math.inf
    if abs(ratio) <= _NEUTRAL:
        return ""
    part = min(1.0, (abs(ratio) - _NEUTRAL) / (math.log2(limit) - _NEUTRAL))
    return ("i" if ratio < 0 else "a") + str(min(_LEVELS, 1 + int(part * _LEVELS)))
