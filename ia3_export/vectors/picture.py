"""A picture of the vectors of one adapter, or of two compared: what it shows, and `write_plot`, which draws it.

Here is how vectors are laid out (layers as rows, kinds of module as columns, stacks such as encoder and decoder) and what
is said of them in words; the numbers are in `vector_numbers`. `vector_html` and `vector_png` draw the same `Picture`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ia3_export.errors import OutputError, UsageError
from ia3_export.fold import Array
from ia3_export.report.files import write_whole
from ia3_export.report.svg import tail
from ia3_export.vectors.channels import Counts
from ia3_export.vectors.numbers import (
    Difference,
    Histogram,
    Strip,
    agreement,
    colour_limit,
    histogram_of,
    magnitudes_of,
    make_difference,
    make_strip,
    percent,
    shown,
)

_MOST_BINS, _FEWEST_BINS, _ALL_BINS = 96, 8, 80_000
_LONGEST_NAME = 160


@dataclass(frozen=True, slots=True, eq=False)
class PlotSite:
    """One place that vectors scale. `module` is untrusted text, `direction` ``in`` or ``out``; `vectors` are 1-D float32
    or float64, one per adapter, None where that adapter has none."""

    module: str
    direction: str
    vectors: tuple[Array | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One site: a strip per adapter. `remark` says why two adapters cannot be compared here."""

    module: str
    direction: str
    strips: tuple[Strip | None, ...]
    difference: Difference | None
    remark: str

    @property
    def cosine(self) -> float | None:
        """Agreement of both adapters on this site."""
        return self.difference.cosine if self.difference else None


@dataclass(frozen=True, slots=True)
class Column:
    """A kind of module: the shortest end of its paths that tells it apart, and how many channels its vectors have."""

    label: str
    channels: str
    colour: int


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Layers below each other, with a cell (or None) for every column."""

    label: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]

    def series(self, column: int) -> list[tuple[int, Cell]]:
        """Row and cell of every site of `column`."""
        return [(i, cell) for i, (_, cells) in enumerate(self.rows) if (cell := cells[column]) is not None]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """All that is drawn. `limit` is the log2 from which a channel gets the strongest colour."""

    names: tuple[str, ...]
    heading: str
    remarks: tuple[str, ...]
    stacks: tuple[Stack, ...]
    totals: tuple[Counts, ...]
    limit: float
    histogram: Histogram
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def not_finite(self) -> bool:
        """Whether a channel, or the ratio of two, is NaN or infinite."""
        ratios = (cell.difference.ratio.counts for cell in self.cells if cell.difference)
        return any(counts.not_finite for counts in (*self.totals, *ratios))

    @property
    def gaps(self) -> bool:
        """Whether there are places without a vector, or without anything to compare."""
        return any(None in row for stack in self.stacks for _, row in stack.rows) or any(
            cell.remark for cell in self.cells
        )


def write_plot(sites: Sequence[PlotSite], names: Sequence[str], file: Path) -> None:
    """Draw `sites` of the adapters `names` (one or two) to `file`, ``.html`` or ``.png``: whole or not at all.

    The same input gives the same bytes. Raises `UsageError` for another suffix, `OutputError`, and for ``.png`` without
    matplotlib `Unsupported`.
    """
    suffix = file.suffix.lower()
    if suffix not in (".html", ".png"):
        raise UsageError(
            f"a plot is written as .html or .png, not as {file.name}", hint="end the name of the file so"
        )
    if file.is_dir():
        raise OutputError(f"{file} is a folder", hint="give a file")
    picture = make_picture(sites, names)
    if suffix == ".html":
        from ia3_export.vectors.html import to_html

        content = to_html(picture).encode()
    else:
        from ia3_export.vectors.png import to_png

        content = to_png(picture)
    write_whole(file, content)


def make_picture(sites: Sequence[PlotSite], names: Sequence[str]) -> Picture:
    """Numbers, layout and words of the plot of `sites`."""
    if not 1 <= len(names) <= 2 or any(len(site.vectors) != len(names) for site in sites):
        raise ValueError("a plot is of one or two adapters, and every site has a vector or None for each")
    known = [site for site in sites if any(vector is not None for vector in site.vectors)]
    vectors = sum(vector is not None for site in known for vector in site.vectors)
    bins = max(_FEWEST_BINS, min(_MOST_BINS, _ALL_BINS // max(1, vectors)))
    cells = [_cell(site, bins) for site in known]
    totals = tuple(
        sum((strip.counts for cell in cells if (strip := cell.strips[i])), Counts())
        for i in range(len(names))
    )
    short = tuple(tail(name, 60) for name in names)
    heading, remarks = (_words_of_one if len(names) == 1 else _words_of_two)(cells, totals, short)
    magnitudes = [
        magnitudes_of([v for site in known if (v := site.vectors[i]) is not None]) for i in range(len(names))
    ]
    return Picture(
        short, heading, remarks, _stacks(known, cells), totals, colour_limit(magnitudes), histogram_of(magnitudes), tuple(cells)
    )  # fmt: skip


def most_changed(cells: Iterable[Cell], count: int) -> list[Cell]:
    """The `count` cells that change most, or in which two adapters differ most."""

    def key(cell: Cell) -> float:
        if len(cell.strips) > 1:
            return cell.difference.apart if cell.difference else -1.0
        return cell.strips[0].from_ones if cell.strips[0] else -1.0

    known = [cell for cell in cells if key(cell) >= 0]
    return sorted(known, key=key, reverse=True)[:count]


def _cell(site: PlotSite, bins: int) -> Cell:
    strips = tuple(None if vector is None else make_strip(vector, bins) for vector in site.vectors)
    known = [vector for vector in site.vectors if vector is not None]
    difference, remark = None, ""
    if len(site.vectors) == 2:
        if len(known) < 2:
            remark = f"only {'A' if site.vectors[0] is not None else 'B'} has a vector here"
        elif known[0].size != known[1].size:
            remark = f"A has {known[0].size:,} channels here, B {known[1].size:,}"
        else:
            difference = make_difference(known[0], known[1], bins)
    return Cell(tail(site.module, _LONGEST_NAME), site.direction, strips, difference, remark)


def _stacks(sites: Sequence[PlotSite], cells: Sequence[Cell]) -> tuple[Stack, ...]:
    """Sites by what stands before their layer number, below it by kind; both in order of appearance."""
    paths = [tuple(site.module.split(".")) for site in sites]
    places = _layer_places(paths)
    patterns = [
        (tuple("*" if i in at else part for i, part in enumerate(path)), site.direction)
        for path, at, site in zip(paths, places, sites, strict=True)
    ]
    # experts have rows of their own: 3.7 is the seventh of layer 3
    members: dict[tuple[tuple[str, ...], bool], list[int]] = {}
    for i, (path, at) in enumerate(zip(paths, places, strict=True)):
        members.setdefault((path[: at[0]] if at else (), len(at) > 1), []).append(i)
    labels = _stack_labels([prefix for prefix, _ in members])
    stacks = []
    for (prefix, crowded), indices in members.items():
        kinds = list(dict.fromkeys(patterns[i] for i in indices))
        names = _kind_labels(kinds)
        grid: dict[tuple[str, ...], dict[int, Cell]] = {}
        for i in indices:
            row = tuple(paths[i][place] for place in places[i])
            grid.setdefault(row, {})[kinds.index(patterns[i])] = cells[i]
        columns = tuple(
            Column(names[kind], _channels(cells[i] for i in indices if patterns[i] == kind), k)
            for k, kind in enumerate(kinds)
        )
        rows = tuple(
            (tail(".".join(row), 9) or "—", tuple(grid[row].get(k) for k in range(len(kinds))))
            for row in sorted(grid, key=lambda row: [(len(p.lstrip("0")), p.lstrip("0"), p) for p in row])
        )
        label = f"{labels[prefix]} several per layer".strip() if crowded else labels[prefix]
        stacks.append(Stack(label, columns, rows))
    return tuple(stacks)


def _layer_places(paths: Sequence[tuple[str, ...]]) -> list[tuple[int, ...]]:
    """Where in each path the number of its layer is: the one that differs between paths that are alike but for numbers
    (``layer.0`` of T5's blocks does not), several for experts, the first where nothing differs."""

    def starred(path: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("*" if re.fullmatch("[0-9]+", part) else part for part in path)

    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in paths:
        alike.setdefault(starred(path), []).append(path)
    found = {}
    for pattern, members in alike.items():
        numbers = [i for i, part in enumerate(pattern) if part == "*"]
        differing = [i for i in numbers if len({path[i] for path in members}) > 1]
        found[pattern] = tuple(differing or numbers[:1])
    return [found[starred(path)] for path in paths]


def _stack_labels(prefixes: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What differs between the paths before the layer number: ``encoder``, ``decoder``; nothing where there is one."""
    known = list(dict.fromkeys(prefix for prefix in prefixes if prefix))
    if len(known) < 2:
        return dict.fromkeys(known, "") | {(): "outside of the layers" if known else ""}
    start = _shared(known)
    end = _shared([prefix[start:][::-1] for prefix in known])
    named = {
        prefix: tail(".".join(prefix[start : len(prefix) - end]) or ".".join(prefix), 40) for prefix in known
    }
    return named | {(): "outside of the layers"}


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all of `paths` begin with."""
    return next(
        (i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths))
    )


def _kind_labels(kinds: Sequence[tuple[tuple[str, ...], str]]) -> dict[tuple[tuple[str, ...], str], str]:
    distinct = {pattern for pattern, _ in kinds}

    def shortest(pattern: tuple[str, ...]) -> str:
        for length in range(1, len(pattern)):
            if sum(other[-length:] == pattern[-length:] for other in distinct) == 1:
                return ".".join(pattern[-length:])
        return ".".join(pattern)

    both = {pattern for pattern, n in Counter(pattern for pattern, _ in kinds).items() if n > 1}
    return {
        (pattern, direction): (tail(shortest(pattern), 32) or "—")
        + (f" ({direction}put)" if pattern in both else "")
        for pattern, direction in kinds
    }


def _channels(cells: Iterable[Cell]) -> str:
    sizes = [strip.counts.channels for cell in cells for strip in cell.strips if strip]
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sentence(counts: Counts) -> str:
    told = f"{percent(counts.inhibited, counts.channels)} inhibited, {percent(counts.amplified, counts.channels)} amplified"
    flips = {0: "none flips sign", 1: "1 channel flips sign"}.get(
        counts.negative, f"{counts.negative:,} channels flip sign"
    )
    broken = f", {counts.not_finite:,} not finite" if counts.not_finite else ""
    return f"{told}, {flips}{broken}"


def _vectors(count: int) -> str:
    return f"{count:,} vector{'' if count == 1 else 's'}"


def _words_of_one(
    cells: Sequence[Cell], totals: Sequence[Counts], _names: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    heading = f"{_vectors(len(cells))}, {totals[0].channels:,} channels: {_sentence(totals[0])}"
    remarks = []
    for cell in most_changed(cells, 1):
        strip = cell.strips[0]
        assert strip is not None
        remarks.append(
            f"Strongest vector: {cell.module}, whose channels are {shown(strip.from_ones)} from 1 (root mean square)."
        )
    known = [(strip, cell) for cell in cells if (strip := cell.strips[0]) and not math.isnan(strip.low)]
    if known:
        low = min(known, key=lambda pair: pair[0].low)
        high = max(known, key=lambda pair: pair[0].high)
        remarks.append(
            f"Smallest factor {shown(low[0].low)} in {low[1].module}, largest {shown(high[0].high)} in {high[1].module}."
        )
    return heading, tuple(remarks)


def _words_of_two(
    cells: Sequence[Cell], totals: Sequence[Counts], names: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    shared = [cell.difference for cell in cells if cell.difference]
    ratio = sum((d.ratio.counts for d in shared), Counts())
    cosines = [d.cosine for d in shared if d.cosine is not None]
    told = f"{percent(ratio.channels - ratio.unchanged, ratio.channels)} of {ratio.channels:,} channels differ by more than 1\u00a0%"
    median = f", median cosine {agreement(float(np.median(cosines)))}" if cosines else ""
    heading = (
        f"{_vectors(len(shared))} in both: {told}{median}"
        if shared
        else "Nothing to compare: no vector in both"
    )
    remarks = []
    for cell in most_changed(cells, 1):
        assert cell.difference is not None
        remarks.append(
            f"Most different: {cell.module}, whose channels are {shown(cell.difference.apart)} apart (root mean square)."
        )
    for i, name in enumerate(names):
        own = sum(cell.strips[i] is not None for cell in cells)
        alone = sum(cell.strips[i] is not None and cell.strips[1 - i] is None for cell in cells)
        more = f"; {alone:,} of them only here" if alone else ""
        remarks.append(f"{'AB'[i]}, {name}: {_vectors(own)}, {_sentence(totals[i])}{more}.")
    odd = sum(all(cell.strips) and cell.difference is None for cell in cells)
    if odd:
        remarks.append(f"{_vectors(odd)} of other length in A than in B: not compared.")
    return heading, tuple(remarks)
