"""The float32 graphs that codes are made of: vectors on the inputs of weights lie on the rows that feed them,
where that is exact."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ia3_export.onnx.export import TracedGraph, with_values
from ia3_export.parity.bits.expected import Expected, expected_tensors, whole
from ia3_export.planning.moved_inputs import all_moved
from ia3_export.planning.plan import Plan


def move_to_rows(traced: list[TracedGraph], plan: Plan, folder: Path) -> tuple[list[TracedGraph], Plan]:
    """The graphs `traced` of the dense model that `plan` makes, written into `folder` as they are of the
    plan with every input vector moved that can be, and that plan.

    Both are what was given where none moves, or where a tensor that would change is no initializer: a
    vector moves as a whole.
    """
    moved = all_moved(plan)
    if moved is None:
        return traced, plan
    before, rows = expected_tensors(plan), expected_tensors(moved)
    other = {name: row for name, row in rows.items() if _differs(before[name], row)}
    held = {origin.tensor for graph in traced for origin in graph.origins.values()}
    if not other.keys() <= held:
        return traced, plan
    values = {name: partial(whole, row) for name, row in other.items()}
    return [with_values(graph, values, folder) for graph in traced], moved


def _differs(before: Expected, row: Expected) -> bool:
    """Whether two plans write other values; biases of zeros, which exporters keep once for all, stay."""
    if before.scales == row.scales:
        return False
    return len(row.source.shape) > 1 or not np.array_equal(whole(before), whole(row))
