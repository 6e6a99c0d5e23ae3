"""From vectors to a picture, and from the picture to a file of the format that its name ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ia3_export.drawing.files import write_whole
from ia3_export.drawing.formats import tail
from ia3_export.errors import OutputError, UsageError
from ia3_export.vectors.channels import Counts
from ia3_export.vectors.html import to_html
from ia3_export.vectors.layout import make_stacks
from ia3_export.vectors.numbers import (
    colour_scale,
    histogram_of,
    magnitudes_of,
    make_difference,
    make_strip,
)
from ia3_export.vectors.picture import Cell, Picture, PlotSite
from ia3_export.vectors.png import to_png
from ia3_export.vectors.words import words_of_one, words_of_two

#: What draws a picture, by the suffix of the file.
WRITERS: Mapping[str, Callable[[Picture], bytes]] = {
    ".html": to_html,
    ".png": to_png,
}

_MOST_BINS, _FEWEST_BINS, _ALL_BINS = 96, 8, 80_000
_LONGEST_NAME = 160


def write_plot(sites: Sequence[PlotSite], names: Sequence[str], file: Path) -> None:
    """Draw `sites` of the adapters `names` (one or two) to `file`, whole or not at all.

    The same input gives the same bytes. Raises `UsageError` for a suffix that is none of `WRITERS`,
    `OutputError`, and for ``.png`` without matplotlib `Unsupported`.
    """
    writer = WRITERS.get(file.suffix.lower())
    if writer is None:
        raise UsageError(
            f"a plot is written as {' or '.join(WRITERS)}, not as {file.name}",
            hint="end the name of the file so",
        )
    if file.is_dir():
        raise OutputError(f"{file} is a folder", hint="give a file")
    write_whole(file, writer(make_picture(sites, names)))


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
    heading, remarks = (words_of_one if len(names) == 1 else words_of_two)(cells, totals, short)
    magnitudes = [
        magnitudes_of([v for site in known if (v := site.vectors[i]) is not None]) for i in range(len(names))
    ]
    return Picture(
        names=short,
        heading=heading,
        remarks=remarks,
        stacks=make_stacks(known, cells),
        totals=totals,
        scale=colour_scale(magnitudes),
        histogram=histogram_of(magnitudes),
        cells=tuple(cells),
    )


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
