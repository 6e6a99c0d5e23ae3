"""What is said of a picture of vectors: its heading, and the remarks below it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ia3_export.vectors.channels import Counts
from ia3_export.vectors.numbers import agreement, percent, shown
from ia3_export.vectors.picture import Cell, most_changed


def words_of_one(
    cells: Sequence[Cell], totals: Sequence[Counts], _names: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Heading and remarks of the picture of one adapter; `totals` has its counts."""
    heading = f"{_vectors(len(cells))}, {totals[0].channels:,} channels: {_sentence(totals[0])}"
    remarks = []
    for cell in most_changed(cells, 1):
        strip = cell.strips[0]
        assert strip is not None
        remarks.append(
            f"Strongest vector: {cell.module}, whose channels are {shown(strip.from_ones)} from 1 "
            "(root mean square)."
        )
    known = [(strip, cell) for cell in cells if (strip := cell.strips[0]) and not math.isnan(strip.low)]
    if known:
        low = min(known, key=lambda pair: pair[0].low)
        high = max(known, key=lambda pair: pair[0].high)
        remarks.append(
            f"Smallest factor {shown(low[0].low)} in {low[1].module}, "
            f"largest {shown(high[0].high)} in {high[1].module}."
        )
    return heading, tuple(remarks)


def words_of_two(
    cells: Sequence[Cell], totals: Sequence[Counts], names: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Heading and remarks of the picture of two adapters; `totals` and `names` have those of each."""
    shared = [cell.difference for cell in cells if cell.difference]
    ratio = sum((d.ratio.counts for d in shared), Counts())
    cosines = [d.cosine for d in shared if d.cosine is not None]
    differ = percent(ratio.channels - ratio.unchanged, ratio.channels)
    told = f"{differ} of {ratio.channels:,} channels differ by more than 1\u00a0%"
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
            f"Most different: {cell.module}, whose channels are {shown(cell.difference.apart)} apart "
            "(root mean square)."
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


def _sentence(counts: Counts) -> str:
    inhibited, amplified = (percent(n, counts.channels) for n in (counts.inhibited, counts.amplified))
    flips = {0: "none flips sign", 1: "1 channel flips sign"}.get(
        counts.negative, f"{counts.negative:,} channels flip sign"
    )
    broken = f", {counts.not_finite:,} not finite" if counts.not_finite else ""
    return f"{inhibited} inhibited, {amplified} amplified, {flips}{broken}"


def _vectors(count: int) -> str:
    return f"{count:,} vector{'' if count == 1 else 's'}"
