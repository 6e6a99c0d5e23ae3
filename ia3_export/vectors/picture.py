"""A picture of the vectors of one adapter, or of two compared, as data: what every writer draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ia3_export.drawing.colours import ColourScale
from ia3_export.fold import Array
from ia3_export.vectors.channels import Counts


@dataclass(frozen=True, slots=True, eq=False)
class PlotSite:
    """One place that vectors scale. `module` is untrusted text, `direction` ``in`` or ``out``.

    `vectors` are 1-D float32 or float64, one per adapter, None where that adapter has none.
    """

    module: str
    direction: str
    vectors: tuple[Array | None, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Strip:
    """One vector as it is shown. Numbers are of its finite channels, NaN where it has none.

    `from_ones` is the root mean square of ``l - 1``; `strongest` are (channel, value) of the channels
    farthest from 1, those that flip the sign first. `ordered` has one value per stretch of channels, the
    strongest in it; `ranked` are as many values from the smallest to the largest channel, both included. Both
    are float64.
    """

    counts: Counts
    low: float
    mean: float
    high: float
    from_ones: float
    strongest: tuple[tuple[int, float], ...]
    ordered: Array
    ranked: Array


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Second adapter beside the first on one site.

    The channels' `ratio`, the `cosine` of both ``l - 1`` (None where one of them is all ones) and the root
    mean square of their difference, `apart`.
    """

    ratio: Strip
    cosine: float | None
    apart: float


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Channels by log2 of their magnitude: `edges` (n + 1), `counts` per adapter (n).

    What lies outside is in the end bins.
    """

    edges: Array
    counts: tuple[Array, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One site: a strip per adapter. `remark` says to people why two adapters cannot be compared here."""

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
    """A kind of module: the shortest end of its paths that tells it apart, and its vectors' channels."""

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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Picture:
    """All that is drawn; `scale` is that of every strip."""

    names: tuple[str, ...]
    heading: str
    remarks: tuple[str, ...]
    stacks: tuple[Stack, ...]
    totals: tuple[Counts, ...]
    scale: ColourScale
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


def most_changed(cells: Iterable[Cell], count: int) -> list[Cell]:
    """The `count` cells that change most, or in which two adapters differ most."""

    def key(cell: Cell) -> float:
        if len(cell.strips) > 1:
            return cell.difference.apart if cell.difference else -1.0
        return cell.strips[0].from_ones if cell.strips[0] else -1.0

    known = [cell for cell in cells if key(cell) >= 0]
    return sorted(known, key=key, reverse=True)[:count]
