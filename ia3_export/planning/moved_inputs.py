"""Vectors on the inputs of weights whose codes shall stay: moved to the projection that feeds them.

As ``--quantized keep`` moves them, by the same table and the same checks, but in a plan for the dense float32
model that a quantized base stands for. A scale of codes belongs to a row, so a weight with a vector on its
input has no codes; its feeder takes the vector on its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ia3_export.adapters.model import Fold
from ia3_export.fold import Scale, make_scale
from ia3_export.planning.changes import Change
from ia3_export.planning.plan import Plan
from ia3_export.planning.quantized_placement import (
    Context,
    WeightFolds,
    make_context,
    place,
    single_precision,
)
from ia3_export.quantization.base import Base
from ia3_export.quantization.packed import BY_ROW, CannotKeep, Packed, Scales


def move_inputs(plan: Plan, quantized: Base, coded: Mapping[str, Packed]) -> tuple[Plan, dict[str, str]]:
    """`plan`, of the dense model that `quantized` stands for, with the input vectors of the `coded` weights
    moved where that is exact; and for the others, by name, why it is not."""
    # what is written is dense: rows take any factor, and no scale is rounded
    rows = {name: replace(packed, on_output=Scales(()), on_input=BY_ROW) for name, packed in coded.items()}
    context = make_context(replace(quantized, quantization=replace(quantized.quantization, packed=rows)))
    changes, reasons = dict(plan.changes), {}
    for name, packed in rows.items():
        change = plan.changes.get(name)
        if change is None or change.how != "fold":
            continue
        inputs = [scale for scale in change.scales if not _on_rows(scale, change, packed)]
        if not inputs:
            continue
        try:
            _, placed = place(WeightFolds(packed, tuple(inputs), change.folds), context)
        except CannotKeep as why:
            reasons[name] = f"a vector lies on its input: {why}"
            continue
        context.placed.update(placed)
        left = tuple(scale for scale in change.scales if _on_rows(scale, change, packed))
        folds = tuple(fold for fold in change.folds if fold.direction != "in")
        changes[name] = replace(change, scales=left, folds=folds)
    _lay_moved(context, plan.base, changes)
    unchanged = [name for name in rows if name in changes and _is_unchanged(changes[name], plan.base)]
    return replace(plan, changes={n: c for n, c in changes.items() if n not in unchanged}), reasons


def _on_rows(scale: Scale, change: Change, packed: Packed) -> bool:
    axis = scale.axis(change.shape)
    return axis == (1 if packed.conv1d else 0)


def _lay_moved(context: Context, dense: Base, changes: dict[str, Change]) -> None:
    """Add what was moved to the `changes` of the `dense` model."""
    tensors = dense.stored.tensors
    moved: dict[str, tuple[tuple[Scale, ...], tuple[Fold, ...]]] = {
        name: (
            (make_scale(single_precision(laid.factors), tensors[name].shape, "out", context.layout),),
            laid.folds,
        )
        for name, laid in context.placed.rows.items()
    }
    # static scales of activations are none of the dense model's
    moved |= {
        name: (other.scales, other.folds) for name, other in context.placed.others.items() if name in tensors
    }
    for name, (scales, folds) in moved.items():
        tensor = tensors[name]
        before = changes.get(name) or Change(name=name, how="fold", dtype=tensor.dtype, source=tensor)
        changes[name] = before.with_folds(scales, folds)


def _is_unchanged(change: Change, base: Base) -> bool:
    return (
        change.how == "fold" and not change.scales and base.stored.tensors.get(change.name) is change.source
    )
