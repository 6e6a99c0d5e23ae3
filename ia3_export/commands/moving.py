"""The float32 graphs that codes are made of: vectors on the inputs of weights lie on the rows that feed them,
where that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ia3_export.onnx.export import TracedGraph, with_values
from ia3_export.onnx.trace import SHARED
from ia3_export.parity.bits.expected import Expected, expected_tensors, whole
from ia3_export.planning.moved_inputs import all_moved
from ia3_export.planning.plan import Plan


def move_to_rows(traced: list[TracedGraph], plan: Plan, folder: Path) -> tuple[list[TracedGraph], Plan]:
    """The graphs `traced` of the dense model that `plan` makes, written into `folder` as they are of the
    plan with every input vector moved that can be, and that plan.

    Both are what was given where none moves, and where a tensor that would change is no initializer, or one
    that stands for another tensor as well: a vector moves as a whole.
    """
    moved = all_moved(plan)
    if moved is None:
        return traced, plan
    before, rows = expected_tensors(plan), expected_tensors(moved)
    held = {origin.tensor for graph in traced for origin in graph.origins.values()}
    other = {
        name: row
        for name, row in rows.items()
        if before[name].scales != row.scales and (name in held or not _same(before[name], row))
    }
    if not other.keys() <= held or any(_is_shared(graph, other, before, rows) for graph in traced):
        return traced, plan
    values = {name: partial(whole, row) for name, row in other.items()}
    return [with_values(graph, values, folder) for graph in traced], moved


def _is_shared(
    graph: TracedGraph,
    other: Mapping[str, Expected],
    before: Mapping[str, Expected],
    rows: Mapping[str, Expected],
) -> bool:
    """Whether an initializer of `graph` that is to have the values of `other` stands for a second tensor,
    which has none of its own, and needs different ones. Small equal tensors are kept once."""
    held = {origin.tensor for origin in graph.origins.values()}
    absent = [row for name, row in before.items() if name not in held and row.source.size <= SHARED]
    return any(
        _same(before[name], row) and not _same(rows[row.name], other[name])
        for name in other.keys() & held
        for row in absent
    )


def _same(one: Expected, row: Expected) -> bool:
    """Whether two small tensors have the same shape and values (zeros of either sign)."""
    if one.source.shape != row.source.shape or row.source.size > SHARED:
        return False
    return np.array_equal(whole(one), whole(row))
