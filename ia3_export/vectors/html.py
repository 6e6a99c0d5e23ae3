"""A `Picture` of vectors as one HTML page: no script, nothing loaded, drawings as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

from ia3_export.drawing import formats, page
from ia3_export.drawing.colours import ColourScale, css_class, runs
from ia3_export.drawing.svg import digits, draw, thin_out
from ia3_export.vectors.numbers import LEVELS, agreement, channel_list, colours, factor_ticks, shown
from ia3_export.vectors.picture import Cell, Histogram, Picture, Stack, Strip, most_changed

_TOP = 8
_KINDS = 8


@dataclass(frozen=True, slots=True)
class Legend:
    """A swatch of the scale: class of its colour, and the factor at its outer edge, where one is written."""

    kind: str
    label: str


def to_html(picture: Picture) -> bytes:
    """`picture` as a page that stands alone, in UTF-8. Names appear as text only."""
    filters: dict[str, Callable[..., object]] = {
        "number": shown,
        "cosine": agreement,
        "channels": channel_list,
        "factor": _factor,
    }
    values = {
        "picture": picture,
        "compared": len(picture.names) == 2,
        "strip": lambda cell, i: _strip(cell, i, picture.scale),
        "ratio": lambda cell: _ratio(cell, picture.scale),
        "profile": _profile,
        "agreement": _cosines,
        "farthest": _farthest,
        "legend": _legend(picture.scale),
        "histogram": _histogram(picture.histogram, picture),
        "top": most_changed(picture.cells, _TOP),
        "odd": [cell for cell in picture.cells if cell.remark],
        "row_height": _row_height,
        "every": lambda stack: thin_out(len(stack.rows), 30),
        "kinds": _KINDS,
    }
    return page.render(files(__package__).joinpath("picture.html.j2"), filters, values).encode()


def _strip(cell: Cell, adapter: int, scale: ColourScale) -> Markup:
    strip = cell.strips[adapter]
    if strip is None:
        return Markup('<span class="none" title="{}">none</span>').format(f"{cell.module}: {cell.remark}")
    mark = f"{'AB'[adapter]}: " if len(cell.strips) > 1 else ""
    text = f"{mark}{cell.module} ({cell.direction}put)\n{_told(strip)}"
    return _picture_of(strip, scale, text)


def _ratio(cell: Cell, scale: ColourScale) -> Markup:
    if cell.difference is None:
        short = f"only {'A' if cell.strips[0] else 'B'}" if None in cell.strips else "lengths"
        return Markup('<span class="none" title="{}">{}</span>').format(
            f"{cell.module}: {cell.remark}", short
        )
    ratio = cell.difference.ratio
    text = (
        f"B / A: {cell.module} ({cell.direction}put)\ncosine {agreement(cell.difference.cosine)}, "
        f"root mean square of B \u2212 A {shown(cell.difference.apart)}\nratios: {_told(ratio)}"
    )
    return _picture_of(ratio, scale, text)


def _told(strip: Strip) -> str:
    c = strip.counts
    broken = f", {c.not_finite:,} not finite" if c.not_finite else ""
    return (
        f"min {shown(strip.low)}, mean {shown(strip.mean)}, max {shown(strip.high)}, "
        f"from one {shown(strip.from_ones)}\n"
        f"of {c.channels:,} channels {c.inhibited:,} inhibited, {c.amplified:,} amplified, "
        f"{c.unchanged:,} unchanged, {c.negative:,} negative{broken}\nstrongest: {channel_list(strip)}"
    )


def _picture_of(strip: Strip, scale: ColourScale, text: str) -> Markup:
    ranked, ordered = (runs(colours(values, scale), "0") for values in (strip.ranked, strip.ordered))
    return Markup(
        '<svg class="strip" role="img" viewBox="0 -.5 {n} 1" preserveAspectRatio="none"><title>{text}</title>'
        '<g class="ranked">{ranked}</g><g class="ordered">{ordered}</g></svg>'
    ).format(n=max(1, len(strip.ranked)), text=text, ranked=ranked, ordered=ordered)


def _row_height(stack: Stack) -> int:
    return next(
        height
        for most, height in ((3, 30), (8, 22), (26, 15), (50, 10), (math.inf, 6))
        if len(stack.rows) <= most
    )


def _farthest(stack: Stack) -> float:
    """Right end of the axis of `_profile`."""
    known = [
        s.from_ones
        for _, row in stack.rows
        for c in row
        if c
        for s in c.strips
        if s and s.from_ones < math.inf
    ]
    return max(known, default=0.0) or 1.0


def _profile(stack: Stack) -> Markup:
    """How far from one every site is: a line per kind, dashed for the second adapter, layers downward."""
    far = _farthest(stack)
    parts, told = [], []
    for k, column in enumerate(stack.columns):
        for i in range(_adapters(stack)):
            points = [
                (100 * strip.from_ones / far, row + 0.5, strip.from_ones, stack.rows[row][0])
                for row, cell in stack.series(k)
                if (strip := cell.strips[i]) and strip.from_ones < math.inf
            ]
            if not points:
                continue
            parts.append(_line(points, f"k{k % _KINDS}{' second' if i else ''}"))
            most = max(points, key=lambda p: p[2])
            name = f"{column.label} of {'AB'[i]}" if _adapters(stack) > 1 else column.label
            told.append(
                f"{name} {shown(points[0][2])} in the first layer, {shown(points[-1][2])} in the last, "
                f"most {shown(most[2])} in layer {most[3]}"
            )
    return _side(stack, f"How far from 1 over depth: {'; '.join(told)}", parts, [25, 50, 75])


def _cosines(stack: Stack) -> Markup:
    """Cosine of both adapters on every site, from -1 at the left to 1 at the right, a dot per site."""
    parts, told = [], []
    for k, column in enumerate(stack.columns):
        points = [
            (50 + 50 * cosine, row + 0.5, cosine, stack.rows[row][0])
            for row, cell in stack.series(k)
            if (cosine := cell.cosine) is not None
        ]
        if points:
            parts.append(_line(points, f"k{k % _KINDS} dots"))
            low, high = min(points, key=lambda p: p[2]), max(points, key=lambda p: p[2])
            told.append(f"{column.label} from {agreement(low[2])} (layer {low[3]}) to {agreement(high[2])}")
    return _side(stack, f"Cosine of A and B: {'; '.join(told) or 'no site to compare'}", parts, [0, 50, 100])


def _adapters(stack: Stack) -> int:
    return next(len(cell.strips) for _, row in stack.rows for cell in row if cell)


def _line(points: Sequence[tuple[float, float, float, str]], kind: str) -> Markup:
    path = "M" + "L".join(f"{digits(x)} {digits(y)}" for x, y, *_ in points)
    dots = "".join(f"M{digits(x)} {digits(y)}h0" for x, y, *_ in points)
    return Markup('<path class="{k} line" d="{p}"/><path class="{k} dot" d="{d}"/>').format(
        k=kind, p=path, d=dots
    )


def _side(stack: Stack, label: str, parts: Sequence[Markup], grid: Sequence[int]) -> Markup:
    n = len(stack.rows)
    lines = "".join(f"M{x} 0V{n}" for x in grid)
    return Markup(
        '<svg class="side" role="img" aria-label="{label}" viewBox="0 0 100 {n}" preserveAspectRatio="none">'
        '<path class="grid" d="{lines}"/>{parts}</svg>'
    ).format(label=formats.clean(label), n=n, lines=lines, parts=Markup("").join(parts))


def _legend(scale: ColourScale) -> list[Legend]:
    edges = scale.edges()
    down = [
        Legend(css_class(-k - 1), f"{1 / edges[k]:.2f}" if k in (2, 4) else "")
        for k in reversed(range(LEVELS))
    ]
    up = [Legend(css_class(k + 1), f"{edges[k]:.2f}" if k in (2, 4) else "") for k in range(LEVELS)]
    return [*down, Legend(css_class(0), ""), *up]


def _histogram(histogram: Histogram, picture: Picture) -> Markup:
    edges, bars = histogram.edges, len(histogram.edges) - 1
    top = max(1.0, max((math.log10(max(1, int(c.max()))) for c in histogram.counts), default=1.0))

    def tall(count: int) -> float:
        return 100 * (math.log10(count) + 0.15) / (top + 0.15) if count else 0.0

    parts = [
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>'
            '<text class="tick" x="-6" y="{y}%" dy=".34em" text-anchor="end">{t}</text>'
        ).format(y=digits(100 - tall(10**power)), t=f"{10**power:,}")
        for power in range(math.floor(top) + 1)
    ]
    middles = 2.0 ** ((edges[:-1] + edges[1:]) / 2)
    for k, (code, count) in enumerate(zip(colours(middles, picture.scale), histogram.counts[0], strict=True)):
        low, high = 2.0 ** edges[k], 2.0 ** edges[k + 1]
        end = f" to {high:.3g}" if k < bars - 1 else ""
        span = f"up to {high:.3g}" if k == 0 else f"from {low:.3g}{end}"
        text = f"{count:,} channels{' of A' if len(picture.names) > 1 else ''} {span}"
        if count:
            parts.append(
                Markup(
                    '<rect class="bar {c}" x="{x}%" width="{w}%" y="{y}%" height="{h}%">'
                    "<title>{t}</title></rect>"
                ).format(
                    c=css_class(int(code)),
                    x=digits(100 * k / bars),
                    w=digits(92 / bars),
                    y=digits(100 - tall(int(count))),
                    h=digits(tall(int(count))),
                    t=text,
                )
            )
    for counts in histogram.counts[1:]:
        steps = "".join(
            f"H{digits(100 * k / bars)}V{digits(100 - tall(int(c)))}" for k, c in enumerate(counts)
        )
        parts.append(
            Markup(
                '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" '
                'overflow="visible"><path class="outline" d="M0 100{}H100V100"/></svg>'
            ).format(steps)
        )
    parts.append(Markup('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/>'))
    low, high = float(edges[0]), float(edges[-1])
    parts += [
        Markup('<text class="tick" x="{x}%" y="100%" dy="17" text-anchor="middle">{t}</text>').format(
            x=digits(100 * (math.log2(tick) - low) / (high - low)), t=text
        )
        for tick, text in factor_ticks(low, high)
    ]
    label = "Channels by the size of their factor: " + "; ".join(
        f"{name}: {counts.inhibited:,} inhibited, {counts.unchanged:,} unchanged, "
        f"{counts.amplified:,} amplified, {counts.negative:,} negative"
        for name, counts in zip(picture.names, picture.totals, strict=True)
    )
    return draw("histogram", 170, formats.clean(label), parts)


def _factor(value: float) -> str:
    return "—" if math.isnan(value) else formats.factor(value).replace("-", "\u2212")
