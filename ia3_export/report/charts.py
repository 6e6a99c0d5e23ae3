"""Charts of the HTML report as inline SVG.

Positions are percentages and lines lie in a stretched inner SVG, so that a chart fills any width while its
text keeps its size. Colours are classes, which the page's style sheet gives for light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from markupsafe import Markup

from ia3_export.drawing.formats import clean, compared, number, power, share, tail
from ia3_export.drawing.svg import anchor, decades, digits, draw, log_position, thin_out
from ia3_export.report.model import LayerError, Reference, Step, WeightsProof

#: A module or channel narrower than a pixel cannot be seen; 400 columns fill a desktop's chart.
COLUMNS = 400
#: The bin of outputs that equal the reference (see `Step.error_histogram`).
EXACT = -99
_SPAN = 18
_GAP = 2.2


def error_axis(steps: Sequence[Step], reference: Reference) -> Markup:
    """Every step's largest error against its bound, the adapters' effect and the live model's rounding."""
    errors = [step.distance.max_error if step.distance else math.inf for step in steps]
    bounds = [step.bound for step in steps]
    own = reference.unmerged.max_error
    low, high = decades([*errors, *(b for b in bounds if b is not None), own, reference.effect])
    at = log_position(low, high)
    top, row = 50, 46
    bottom = top + row * len(steps)
    parts = [_x_ticks(low, high, top - 4, bottom)]
    marks = (
        (reference.effect, "effect of the adapters", "effect", 12),
        (own, "rounding of the live model", "own", 30),
    )
    for value, text, kind, y in marks:
        # broken where the rows have their text
        ends = [y + 5, *(top + row * i + k for i in range(len(steps)) for k in (4, 20)), bottom]
        line = "".join(f"M0 {a}V{b}" for a, b in zip(ends[::2], ends[1::2], strict=True))
        parts.append(
            Markup(
                '<svg class="mark" x="{x}%"><path class="{k}" d="{d}"/></svg>'
                '<text class="{k}" x="{x}%" y="{y}" text-anchor="{a}">{text} {v}</text>'
            ).format(
                x=digits(at(value)), k=kind, d=line, y=y, a=anchor(at(value)), text=text, v=number(value)
            )
        )
    for i, (step, error, bound) in enumerate(zip(steps, errors, bounds, strict=True)):
        parts.append(_axis_row(step, error, bound, at, top + row * i))
    return draw("axis", bottom + 22, _axis_label(steps, errors, bounds, reference), parts)


def layer_plot(layers: Sequence[LayerError], first: str | None) -> Markup:
    """Error of every module over its scale: live model, artifact, bound; modules out of bound are crossed."""
    shown = _thin(layers)
    rows = [(i, layers[i]) for i in shown]
    values = [_over(v, m.scale) for _, m in rows for v in (m.unmerged, m.error, m.bound)]
    low, high = decades(values)
    height = 240
    across = log_position(low, high)

    def y(value: float, scale: float) -> float:
        return 100 - across(_over(value, scale))

    def x(index: int) -> float:
        return 100 * (index + 0.5) / len(layers)

    every = thin_out(high - low, 6)
    parts = [
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>'
            '<text class="tick" x="-8" y="{y}%" dy=".35em" text-anchor="end">{t}</text>'
        ).format(y=digits(100 - 100 * (n - low) / (high - low)), t=power(n))
        for n in range(low, high + 1, every)
    ]
    paths = {
        "bound": [(x(i), y(m.bound, m.scale)) for i, m in rows],
        "unmerged": [(x(i), y(m.unmerged, m.scale)) for i, m in rows],
        "artifact": [(x(i), y(m.error, m.scale)) for i, m in rows],
    }
    limits = paths["bound"]
    area = [(0.0, 100.0), (0.0, limits[0][1]), *limits, (100.0, limits[-1][1]), (100.0, 100.0)]
    lines = [Markup('<path class="allowed" d="{}"/>').format(_path(area))]
    lines += [Markup('<path class="line {}" d="{}"/>').format(kind, _path(p)) for kind, p in paths.items()]
    parts.append(
        Markup(
            '<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">{}</svg>'
        ).format(Markup("").join(lines))
    )
    parts += [
        Markup('<text class="cross" x="{}%" y="{}%" dy=".33em" text-anchor="middle">\u00d7</text>').format(
            digits(x(i)), digits(y(m.error, m.scale))
        )
        for i, m in rows
        if not m.passed
    ]
    where = next((i for i, m in enumerate(layers) if m.module == first), None)
    if first is not None and where is not None:
        parts.append(
            Markup(
                '<line class="first" x1="{x}%" x2="{x}%" y1="-6" y2="100%"/>'
                '<text class="first" x="{x}%" y="-12" text-anchor="{a}">{text}</text>'
            ).format(x=digits(x(where)), a=anchor(x(where)), text=f"first: {tail(first, 30)}")
        )
    parts += _block_ticks(layers, x)
    parts += _tooltips(layers, rows)
    failed = sum(not m.passed for m in layers)
    label = f"Error of {len(layers)} modules in execution order, logarithmic: {failed} out of bound" + (
        f", first {clean(first)}" if first else ""
    )
    return draw("layers", height, label, parts)


def histogram(step: Step, reference: Reference | None, low: int, high: int) -> Markup:
    """Output elements by power of ten of the error, from 10^`low` to 10^(`high` + 1), counts logarithmic."""
    counts: dict[int, int] = {}
    for n, count in step.error_histogram:
        key = n if n == EXACT else max(low, min(high, n))
        counts[key] = counts.get(key, 0) + count
    peak, total = max(counts.values(), default=1), max(1, sum(counts.values()))
    # the bin of exact outputs stands apart: it has no place on a logarithmic axis
    columns = high - low + 1 + _GAP
    parts = []
    for n, count in sorted(counts.items()):
        left = 0.0 if n == EXACT else (n - low + _GAP) / columns
        tall = 86 * math.log10(1 + count) / math.log10(1 + peak) if count else 0.0
        if n == EXACT:
            text = f"exact: {count:,} ({share(count / total)})"
        else:
            text = f"{power(n)} to {power(n + 1)}: {count:,} ({share(count / total)})"
        parts.append(
            Markup(
                '<g class="bar{kind}"><title>{text}</title><rect x="{x}%" width="{w}%" y="{y}%" '
                'height="{h}%"/><text x="{m}%" y="{y}%" dy="-4" text-anchor="middle">{c}</text></g>'
            ).format(
                kind=" exact" if n == EXACT else "",
                text=text,
                x=digits(100 * (left + 0.08 / columns)),
                w=digits(84 / columns),
                y=digits(100 - tall),
                h=digits(tall),
                m=digits(100 * (left + 0.5 / columns)),
                c=_short(count),
            )
        )
    parts.append(Markup('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/>'))
    tick = Markup('<text class="tick" x="{}%" y="100%" dy="16" text-anchor="middle">{}</text>')
    parts.append(tick.format(digits(50 / columns), "exact"))
    parts += [
        tick.format(digits(100 * (n - low + _GAP) / columns), power(n))
        for n in range(low, high + 2, thin_out(high - low + 1, 7))
    ]
    place = _bound_place(step, reference)
    if low <= place <= high + 1:
        x = 100 * (place - low + _GAP) / columns
        parts.append(
            Markup(
                '<line class="limit" x1="{x}%" x2="{x}%" y1="-6" y2="100%"/>'
                '<text class="limit" x="{x}%" y="-11" text-anchor="{a}">bound</text>'
            ).format(x=digits(x), a="end" if x > 50 else "start")
        )
    many = " many" if len(counts) > 9 else ""
    label = f"Output elements of {clean(step.name)} by the size of their error: " + ", ".join(
        f"{'exact' if n == EXACT else power(n)} {count:,}" for n, count in sorted(counts.items())
    )
    return draw("histogram" + many, 110, label, parts)


def histogram_range(steps: Sequence[Step], reference: Reference | None) -> tuple[int, int]:
    """Lowest and highest power of ten that the histograms of `steps` share, at most 18 apart."""
    powers = [n for step in steps for n, count in step.error_histogram if n != EXACT and count]
    worst = max(powers, default=-6)
    places = [_bound_place(step, reference) for step in steps]
    # bounds a little above the worst error are shown too, those far away would press the bars together
    high = max([worst, *(math.floor(p) for p in places if worst < p < worst + 4)])
    return max(min(powers, default=high), high - _SPAN + 1), high


def effect_gauge(present: float) -> Markup:
    """Share of the adapters' effect on a line from the base (0) over right (1) to applied twice (2)."""

    def x(value: float) -> float:
        return 100 * (min(2.25, max(-0.25, value)) + 0.25) / 2.5

    ticks = [
        Markup(
            '<line class="tickmark" x1="{x}%" x2="{x}%" y1="4" y2="14"/>'
            '<text class="tick" x="{x}%" y="27" text-anchor="middle">{t}</text>'
        ).format(x=digits(x(v)), t=t)
        for v, t in ((0, "base"), (1, "once"), (2, "twice"))
    ]
    line = Markup('<line class="track" x1="0" x2="100%" y1="9" y2="9"/>')
    dot = Markup('<circle class="dot" cx="{}%" cy="9" r="5"/>').format(digits(x(present)))
    return draw("gauge", 30, f"{share(present)} of the adapters' effect is present", [line, *ticks, dot])


def weights_bar(proof: WeightsProof) -> Markup:
    """Share of changed, unchanged, computed and wrong tensors of an artifact."""
    counts = {
        "changed": proof.changed,
        "unchanged": proof.unchanged,
        "computed": proof.computed,
        "wrong": len(proof.findings),
    }
    total, left, parts = max(1, sum(counts.values())), 0.0, []
    for kind, count in counts.items():
        if count:
            text = Markup("<title>{}</title>").format(f"{count:,} {kind}")
            parts.append(
                Markup('<rect class="{}" x="{}%" width="{}%" height="100%">{}</rect>').format(
                    kind, digits(left), digits(max(0.4, 100 * count / total)), text
                )
            )
        left += 100 * count / total
    label = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return draw("weights", 10, f"Tensors of {clean(proof.name)}: {label}", parts)


def _bound_place(step: Step, reference: Reference | None) -> float:
    bound = step.bound
    if bound is None or reference is None or not (0 < bound < math.inf and 0 < reference.scale < math.inf):
        return math.inf
    return math.log10(bound / reference.scale)


def _axis_row(
    step: Step, error: float, bound: float | None, at: Callable[[float], float], top: int
) -> Markup:
    x, state = at(error), "pass" if step.passed else "fail"
    y = top + 29
    limit = None if bound is None else at(bound)
    parts = []
    if limit is not None:
        parts.append(
            Markup('<rect class="allowed" x="0" width="{l}%" y="{y}" height="14"/>').format(
                l=digits(limit), y=y - 7
            )
        )
    parts.append(Markup('<line class="track" x1="0" x2="100%" y1="{y}" y2="{y}"/>').format(y=y))
    if limit is not None and x > limit:
        parts.append(
            Markup('<line class="excess" x1="{l}%" x2="{x}%" y1="{y}" y2="{y}"/>').format(
                l=digits(limit), x=digits(x), y=y
            )
        )
    if limit is not None:
        parts.append(
            Markup('<line class="limit" x1="{l}%" x2="{l}%" y1="{a}" y2="{b}"/>').format(
                l=digits(limit), a=y - 9, b=y + 9
            )
        )
    if step.passed:
        parts.append(Markup('<circle class="dot pass" cx="{}%" cy="{}" r="5.5"/>').format(digits(x), y))
    else:
        parts.append(
            Markup('<text class="cross" x="{}%" y="{}" dy=".34em" text-anchor="middle">\u00d7</text>').format(
                digits(x), y
            )
        )
    shown = "no value" if step.distance is None else number(error)
    if bound is None:
        told = shown
    elif step.distance is None:
        told = f"{shown}, bound {number(bound)}"
    else:
        told = f" {'≤' if error <= bound else '>'} ".join(compared(error, bound))
    parts.append(
        Markup(
            '<text class="name {s}" x="0" y="{y}">{mark} {name}</text>'
            '<text class="value" x="100%" y="{y}" text-anchor="end">{v}</text>'
        ).format(
            s=state,
            y=y - 14,
            mark="✓" if step.passed else "✗",
            name=tail(step.name, 24),
            v=told,
        )
    )
    title = f"{clean(step.name)}: {told}"
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(parts))


def _axis_label(
    steps: Sequence[Step], errors: Sequence[float], bounds: Sequence[float | None], reference: Reference
) -> str:
    told = "; ".join(
        f"{clean(s.name)} {number(e)}, bound {number(b)}, {'passed' if s.passed else 'failed'}"
        for s, e, b in zip(steps, errors, bounds, strict=True)
    )
    return (
        f"Largest error of every step on a logarithmic axis: {told}. Effect of the adapters "
        f"{number(reference.effect)}, rounding of the live model {number(reference.unmerged.max_error)}"
    )


def _x_ticks(low: int, high: int, top: int, bottom: int) -> Markup:
    tick = Markup(
        '<line class="grid" x1="{x}%" x2="{x}%" y1="{t}" y2="{b}"/>'
        '<text class="tick" x="{x}%" y="{y}" text-anchor="middle">{text}</text>'
    )
    return Markup("").join(
        tick.format(
            x=digits(100 * (n - low) / (high - low)), t=top, b=bottom + 4, y=bottom + 18, text=power(n)
        )
        for n in range(low, high + 1, thin_out(high - low, 6))
    )


def _block_ticks(layers: Sequence[LayerError], x: Callable[[int], float]) -> list[Markup]:
    starts: list[tuple[int, str]] = []
    for i, layer in enumerate(layers):
        block = next((part for part in layer.module.split(".") if part.isdecimal()), None)
        if block is not None and (not starts or starts[-1][1] != block):
            starts.append((i, block))
    every = thin_out(len(starts), 12)
    return [
        Markup(
            '<line class="tickmark" x1="{x}%" x2="{x}%" y1="100%" y2="102.5%"/>'
            '<text class="tick" x="{x}%" y="100%" dy="20" text-anchor="middle">{t}</text>'
        ).format(x=digits(x(i)), t=tail(block, 6))
        for i, block in starts[::every]
    ]


def _tooltips(layers: Sequence[LayerError], rows: Sequence[tuple[int, LayerError]]) -> list[Markup]:
    column = Markup(
        '<g class="hover"><title>{text}</title><rect x="{x}%" width="{w}%" y="0" height="100%"/></g>'
    )
    ends = [i for i, _ in rows[1:]] + [len(layers)]
    starts = [0, *ends[:-1]]
    return [
        column.format(
            text=f"{clean(m.module)}{'' if m.passed else ' OUT OF BOUND'}\nerror {number(m.error)}, "
            f"live model {number(m.unmerged)}, bound {number(m.bound)}, scale {number(m.scale)}",
            x=digits(100 * start / len(layers)),
            w=digits(100 * (end - start) / len(layers)),
        )
        for (_, m), start, end in zip(rows, starts, ends, strict=True)
    ]


def _thin(layers: Sequence[LayerError]) -> list[int]:
    """Indices to draw: of each of `COLUMNS` stretches the module that is worst."""
    if len(layers) <= COLUMNS:
        return list(range(len(layers)))
    edges = [len(layers) * k // COLUMNS for k in range(COLUMNS + 1)]

    def badness(i: int) -> tuple[bool, float]:
        return not layers[i].passed, _over(layers[i].error, layers[i].scale)

    return [max(range(a, b), key=badness) for a, b in pairwise(edges)]


def _over(value: float, scale: float) -> float:
    if value == 0:
        return 0.0
    return value / scale if scale > 0 and math.isfinite(value) else math.inf


def _short(count: int) -> str:
    for unit, symbol in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2g}{symbol}" if count < 100 * unit else f"{count / unit:.0f}{symbol}"
    return str(count)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{digits(x)} {digits(y)}" for x, y in points)
