"""A `Picture` of vectors as a PNG of 1600 pixels' width, through matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3_export.drawing.colours import NEGATIVE, NOT_FINITE
from ia3_export.drawing.formats import clean, tail
from ia3_export.drawing.svg import thin_out
from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.vectors.numbers import LEVELS, agreement, colours, factor_ticks, shown
from ia3_export.vectors.picture import Cell, Picture, Stack, Strip, most_changed

#: Colours of the codes -LEVELS..LEVELS, then negative and not finite: those of the HTML page in the light.
_PALETTE = [
    "#0c4180",
    "#1f67ab",
    "#418dc6",
    "#74b0d9",
    "#aacfe9",
    "#d5e5f3",
    "#eceef1",
    "#fde7c8",
    "#fccd92",
    "#f7a94f",
    "#e5811a",
    "#bf5a06",
    "#8a3b00",
    "#000000",
    "#d020c0",
]
_KINDS = ["#7a4fc0", "#00857c", "#c2307f", "#6b7a00", "#4a545f", "#a33a2a", "#2f7d32", "#0b63c5"]
_TEXT, _MUTED, _LINE, _GHOST = "#1b1f24", "#59636e", "#dbdfe5", "#8a94a0"
_WIDTH, _MARGIN, _DPI = 16.0, 0.45, 100
_COLUMNS = 9
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": _TEXT,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "hatch.color": _GHOST,
}


@dataclass(frozen=True, slots=True)
class _Font:
    """Of a text; without a size or a color those of `_STYLE`."""

    size: float | None = None
    weight: str = "normal"
    color: str | None = None


_PLAIN, _NOTE, _HEAD = _Font(), _Font(color=_MUTED), _Font(13, "bold")


class _Sheet:
    """A figure filled from the top: `y` is how far, in inches.

    The height is known only at the end, so that what is placed is kept in inches until then.
    """

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.y = _MARGIN
        self._axes: list[tuple[Any, tuple[float, float, float, float]]] = []

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """New axes whose upper left corner is at `x`, `y`."""
        axes = self.figure.add_axes((0, 0, 1, 1), label=str(len(self._axes)))
        self._axes.append((axes, (x, y, width, height)))
        axes.tick_params(length=0, labelsize=10)
        return axes

    def text(self, x: float, y: float, text: str, font: _Font = _PLAIN, *, ha: str = "left") -> None:
        """`text` with its upper left corner (with `ha` right: its upper right one) at `x`, `y`."""
        axes = self.axes(x, y, 1, 1)
        axes.axis("off")
        style = {"size": font.size, "weight": font.weight, "ha": ha, "va": "top"} | (
            {} if font.color is None else {"color": font.color}
        )
        axes.text(0, 1, " ".join(clean(text).split()), style, transform=axes.transAxes)

    def paragraph(self, text: str, most: int, height: float, font: _Font) -> None:
        """`text` in lines of at most `most` characters, below all that is there."""
        for line in textwrap.wrap(clean(text), most):
            self.text(_MARGIN, self.y, line, font)
            self.y += height

    def finish(self) -> bytes:
        """The PNG."""
        height = self.y + _MARGIN
        self.figure.set_size_inches(_WIDTH, height)
        for axes, (x, y, w, h) in self._axes:
            axes.set_position((x / _WIDTH, 1 - (y + h) / height, w / _WIDTH, h / height))
        file = io.BytesIO()
        # neither time nor version, so that the same input gives the same bytes
        self.figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
        return file.getvalue()


def to_png(picture: Picture) -> bytes:
    """`picture` as a PNG, light. Raises `Unsupported` without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported(
            "a plot as .png needs matplotlib", hint="pip install 'ia3-export[plot]', or write .html"
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may hold letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(facecolor="white")
        FigureCanvasAgg(figure)
        sheet = _Sheet(figure)
        _header(sheet, picture)
        for band in _bands(picture.stacks):
            _band(sheet, picture, band)
        _bottom(sheet, picture)
        return sheet.finish()


def _header(sheet: _Sheet, picture: Picture) -> None:
    names = picture.names
    title = (
        f"IA3 adapter {names[0]}" if len(names) == 1 else f"IA3 adapters {names[0]} (A) and {names[1]} (B)"
    )
    sheet.paragraph(title, 130, 0.3, _Font(12, color=_MUTED))
    sheet.paragraph(picture.heading, 92, 0.42, _Font(20, "bold"))
    for remark in picture.remarks:
        sheet.paragraph(remark, 150, 0.26, _Font(12))
    sheet.y += 0.3
    _legend(sheet, picture)
    sheet.y += 0.55


def _legend(sheet: _Sheet, picture: Picture) -> None:
    edges = picture.scale.edges()
    axes = sheet.axes(_MARGIN + 0.85, sheet.y, 4.0, 0.2)
    axes.imshow(
        [[_rgb(code) for code in range(-LEVELS, LEVELS + 1)]],
        aspect="auto",
        interpolation="nearest",
        extent=(-LEVELS - 0.5, LEVELS + 0.5, 0, 1),
    )
    places = [(k, edges[k]) for k in (2, 4)]
    axes.set_xticks(
        [*(-k - 0.5 for k, _ in places), 0, *(k + 0.5 for k, _ in places)],
        [*(f"{1 / edge:.2f}" for _, edge in places), "1", *(f"{edge:.2f}" for _, edge in places)],
    )
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    sheet.text(_MARGIN, sheet.y + 0.01, "inhibits", _NOTE)
    sheet.text(_MARGIN + 4.95, sheet.y + 0.01, "amplifies", _NOTE)
    marks: list[tuple[int | None, str]] = [(NEGATIVE, "negative: flips the sign")]
    if picture.not_finite:
        marks.append((NOT_FINITE, "not finite"))
    if picture.gaps:
        marks.append((None, "no vector"))
    for i, (code, text) in enumerate(marks):
        x = _MARGIN + 6.1 + 2.5 * i
        axes = sheet.axes(x, sheet.y, 0.2, 0.2)
        axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
        if code is None:
            _hatch(axes, 0)
        else:
            axes.set_facecolor(_rgb(code))
        sheet.text(x + 0.28, sheet.y + 0.01, text, _NOTE)
    sheet.text(
        _WIDTH - _MARGIN,
        sheet.y + 0.01,
        "each strip: a vector's channels, sorted by size",
        _NOTE,
        ha="right",
    )


def _bands(stacks: Sequence[Stack]) -> list[list[Stack]]:
    """Stacks beside each other as long as their columns fit."""
    bands: list[list[Stack]] = []
    for stack in stacks:
        if not bands or sum(len(s.columns) for s in (*bands[-1], stack)) > _COLUMNS:
            bands.append([])
        bands[-1].append(stack)
    return bands


def _band(sheet: _Sheet, picture: Picture, band: Sequence[Stack]) -> None:
    compared = len(picture.names) == 2
    # a row is at most 0.28 inches high and at least 0.045, unless there are very many
    tall = [
        min(12.0, len(s.rows) * min(0.28, max(0.045, (2.6 if compared else 3.4) / len(s.rows)))) for s in band
    ]
    labels, gap, between = 0.42, 0.08, 0.3
    columns = sum(len(stack.columns) for stack in band)
    free = _WIDTH - 2 * _MARGIN - len(band) * labels - gap * columns - between * (len(band) - 1)
    # the profile beside a stack is as wide as a column, but no wider than it must be
    side = min(3.0, free / (columns + len(band)))
    width = (free - side * len(band)) / columns
    for view in ("A", "B", "B / A") if compared else ("A",):
        if compared:
            name = (
                "orange where B is larger, blue where it is smaller"
                if view == "B / A"
                else picture.names["AB".index(view)]
            )
            sheet.text(_MARGIN, sheet.y, f"{view}: {name}", _HEAD)
            sheet.y += 0.32
        if any(stack.label for stack in band):
            sheet.y += 0.3
        x = _MARGIN
        for stack, height in zip(band, tall, strict=True):
            left = x + labels
            if stack.label:
                sheet.text(left, sheet.y - 0.3, stack.label[:1].upper() + stack.label[1:], _HEAD)
            for k, column in enumerate(stack.columns):
                # long labels get smaller before they get shorter
                size = min(11.0, max(8.0, 108 * width / len(column.label)))
                most = max(4, int(106 * width / size))
                sheet.text(left + 0.16, sheet.y, tail(column.label, most), _Font(size, "bold"))
                sheet.text(left - 0.01, sheet.y, "\u25cf", _Font(11, color=_KINDS[k % len(_KINDS)]))
                sheet.text(left, sheet.y + 0.2, column.channels, _Font(9.5, color=_MUTED))
                _heat(sheet.axes(left, sheet.y + 0.42, width, height), picture, stack, k, view, height)
                left += width + gap
            told = "cosine" if view == "B / A" else "l \u2212 1, rms"
            sheet.text(left + 0.1, sheet.y, told, _Font(11, "bold"))
            _side(sheet.axes(left + 0.1, sheet.y + 0.42, side - 0.1, height), stack, view)
            x = left + side + between
        sheet.y += 0.42 + max(tall) + 0.42
    sheet.y += 0.05


def _heat(axes: Any, picture: Picture, stack: Stack, column: int, view: str, height: float) -> None:
    n = len(stack.rows)
    shown_cells = [(row, strip) for row, cell in stack.series(column) if (strip := _strip_of(cell, view))]
    width = max((len(strip.ranked) for _, strip in shown_cells), default=1) or 1
    pixels = np.ones((n, width, 3))
    for row, strip in shown_cells:
        if len(strip.ranked):
            codes = colours(strip.ranked, picture.scale)[np.arange(width) * len(strip.ranked) // width]
            pixels[row] = _RGB[codes + LEVELS]
    axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, 1, n, 0))
    for row in set(range(n)) - {row for row, _ in shown_cells}:
        _hatch(axes, row)
    if n <= 50:
        axes.hlines(range(1, n), 0, 1, colors="white", linewidth=0.8)
    axes.set(xticks=[], yticks=[])
    if column == 0:
        every = thin_out(n, max(1, int(height / 0.13)))
        axes.set_yticks(np.arange(0, n, every) + 0.5, [label for label, _ in stack.rows[::every]])
    axes.spines[:].set_visible(False)


def _hatch(axes: Any, row: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((0, row), 1, 1, facecolor="white", edgecolor=_GHOST, hatch="/////", linewidth=0))


def _side(axes: Any, stack: Stack, view: str) -> None:
    n = len(stack.rows)
    for k in range(len(stack.columns)):
        points = [(v, row + 0.5) for row, cell in stack.series(k) if (v := _value_of(cell, view)) is not None]
        if points:
            style = {"color": _KINDS[k % len(_KINDS)], "marker": "o", "markersize": 3.2, "linewidth": 1.6}
            if view == "B / A":
                style |= {"linewidth": 0.6, "markersize": 4.2}
            axes.plot(*zip(*points, strict=True), **style, clip_on=False)
    every = [
        v
        for k in range(len(stack.columns))
        for _, cell in stack.series(k)
        for letter, _ in zip("AB", cell.strips, strict=False)
        if (v := _value_of(cell, letter)) is not None
    ]
    far = max(every, default=0.0) or 1.0
    ticks = (-1, 0, 1) if view == "B / A" else (0, far)
    axes.set(xlim=(ticks[0], ticks[-1]), ylim=(n, 0), yticks=[])
    axes.set_xticks(ticks, [shown(float(tick)) for tick in ticks])
    axes.xaxis.tick_top()
    axes.tick_params(pad=1, labelsize=9.5)
    # the labels at the ends stay within the chart
    for label, place in zip(
        axes.get_xticklabels(), ("left", *["center"] * (len(ticks) - 2), "right"), strict=True
    ):
        label.set_horizontalalignment(place)
    axes.set_xticks(np.linspace(ticks[0], ticks[-1], 5), minor=True)
    axes.grid(axis="x", which="both", color=_LINE, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="minor", length=0)


def _bottom(sheet: _Sheet, picture: Picture) -> None:
    top, left = sheet.y, _MARGIN + 0.75
    sheet.text(_MARGIN, top, "All channels", _HEAD)
    about = "by the size of their factor" + ("; bars A, line B" if len(picture.names) == 2 else "")
    sheet.text(_MARGIN + 1.35, top + 0.02, about, _NOTE)
    axes = sheet.axes(left, top + 0.45, 6.6, 2.3)
    edges, counts = picture.histogram.edges, picture.histogram.counts
    codes = colours(2.0 ** ((edges[:-1] + edges[1:]) / 2), picture.scale)
    bars = [_GHOST if code == 0 else _PALETTE[code + LEVELS] for code in codes]
    axes.bar(
        edges[:-1],
        counts[0],
        np.diff(edges) * 0.92,
        align="edge",
        color=bars,
        edgecolor=_GHOST,
        linewidth=0.3,
    )
    if len(counts) > 1:
        axes.stairs(counts[1], edges, color=_TEXT, linewidth=1.5, baseline=None)
    highest = max(1, max(int(c.max()) for c in counts))
    axes.set(yscale="log", ylim=(0.7, 1.6 * highest), xlim=(edges[0], edges[-1]))
    powers = [10**k for k in range(int(math.log10(highest)) + 1)]
    axes.set_yticks(powers, [f"{power:,}" for power in powers])
    axes.set_yticks([], minor=True)
    ticks = factor_ticks(float(edges[0]), float(edges[-1]))
    axes.set_xticks([math.log2(tick) for tick, _ in ticks], [text for _, text in ticks])
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _list(sheet, picture, left + 7.1, top)
    sheet.y = top + 3.0


def _list(sheet: _Sheet, picture: Picture, x: float, y: float) -> None:
    compared = len(picture.names) == 2
    sheet.text(x, y, "Where they differ most" if compared else "What changes most", _HEAD)
    heads = ("B \u2212 A", "cosine") if compared else ("l \u2212 1, rms", "min", "max")
    ends = [_WIDTH - _MARGIN - 0.85 * k for k in reversed(range(len(heads)))]
    for end, head in zip(ends, heads, strict=True):
        sheet.text(end, y + 0.3, head, _Font(10.5, color=_MUTED), ha="right")
    most = int((ends[0] - 0.75 - x) * 11.8)
    for i, cell in enumerate(most_changed(picture.cells, 8)):
        line, first = y + 0.56 + 0.265 * i, cell.strips[0]
        sheet.text(x, line, tail(cell.module, most), _Font(10.5))
        if cell.difference:
            values = [shown(cell.difference.apart), agreement(cell.difference.cosine)]
        else:
            assert first is not None
            values = [shown(first.from_ones), shown(first.low), shown(first.high)]
        for end, value in zip(ends, values, strict=True):
            sheet.text(end, line, value, _Font(10.5), ha="right")


def _strip_of(cell: Cell, view: str) -> Strip | None:
    if view == "B / A":
        return cell.difference.ratio if cell.difference else None
    return cell.strips["AB".index(view)]


def _value_of(cell: Cell, view: str) -> float | None:
    if view == "B / A":
        return cell.cosine
    strip = _strip_of(cell, view)
    return strip.from_ones if strip and math.isfinite(strip.from_ones) else None


def _rgb(code: int) -> tuple[float, ...]:
    return tuple(int(_PALETTE[code + LEVELS][i : i + 2], 16) / 255 for i in (1, 3, 5))


_RGB: Array = np.array([_rgb(code) for code in range(-LEVELS, LEVELS + 3)])
