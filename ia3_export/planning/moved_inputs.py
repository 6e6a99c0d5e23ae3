"""Vectors on the inputs of weights that become codes: moved to the projection that feeds them.

As ``--quantized keep`` moves them, by the same table and the same checks, but in the plan of a dense model. A
scale of codes belongs to a row: the codes of a weight with a vector on its input are others than its own,
while the projection that feeds it takes the vector in the scales of its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Layout, Scale, make_scale
from ia3_export.planning.changes import Change, written_dtype
from ia3_export.planning.plan import Plan
from ia3_export.planning.quantized_placement import feeder_rows, single_precision, stored_shapes
from ia3_export.quantization.packed import CannotKeep

#: (out, in) of every weight.
Shapes = Mapping[str, tuple[int, ...]]


def move_inputs(plan: Plan, names: Collection[str]) -> tuple[Plan, dict[str, str]]:
    """`plan`, of a dense model, with the input vectors of the weights `names` moved where that is exact; and
    for the others, by name, why it is not."""
    changes, reasons = dict(plan.changes), {}
    shapes: dict[Layout, Shapes] = {
        layout: stored_shapes(plan.base.dense.tensors, conv1d=layout == "conv1d")
        for layout in ("linear", "conv1d")
    }
    for name in names:
        change = changes.get(name)
        if change is None or change.how != "fold":
            continue
        placed = list(zip(change.scales, change.folds, strict=True))
        inputs = [(scale, fold) for scale, fold in placed if fold.direction == "in"]
        if not inputs:
            continue
        try:
            moved = [one for scale, fold in inputs for one in _moved(plan, shapes, change, scale, fold)]
        except CannotKeep as why:
            reasons[name] = f"a vector lies on its input: {why}"
            continue
        left = [(scale, fold) for scale, fold in placed if fold.direction != "in"]
        changes[name] = replace(change, scales=tuple(s for s, _ in left), folds=tuple(f for _, f in left))
        for tensor, scale, fold in moved:
            before = changes.get(tensor.name) or _start(plan, tensor)
            how = "fold" if before.how in ("cast", "dequantize") else before.how
            changes[tensor.name] = replace(before, how=how).with_folds((scale,), (fold,))
    settled = {name: _settled(change) for name, change in changes.items()}
    return replace(plan, changes={name: one for name, one in settled.items() if one is not None}), reasons


def all_moved(plan: Plan) -> Plan | None:
    """`plan` with every input vector moved that can be; None where none can, or where the base's own codes
    stay."""
    if plan.base.is_quantized and not plan.dequantizes:
        return None
    moved, _ = move_inputs(plan, plan.changes)
    return moved if moved.changes != plan.changes else None


def _moved(
    plan: Plan, shapes: Mapping[Layout, Shapes], change: Change, scale: Scale, fold: Fold
) -> list[tuple[StoredTensor, Scale, Fold]]:
    """The tensors that take the vector `scale` on the input of `change`, and how. Raises `CannotKeep`."""
    axis = scale.axis(change.shape)
    if len(change.shape) != 2 or axis is None:
        raise CannotKeep("it is no single projection")
    layout: Layout = "linear" if axis == 1 else "conv1d"
    tensors = plan.base.dense.tensors
    module = change.name.removesuffix(".weight")
    feeder, factors = feeder_rows(module, scale.factors, plan.base.stored.config, shapes[layout])
    return [
        (tensors[name], make_scale(single_precision(factors), tensors[name].shape, "out", layout), fold)
        for name in (f"{feeder}.weight", f"{feeder}.bias")
        if name in tensors
    ]


def _start(plan: Plan, tensor: StoredTensor) -> Change:
    dtype = written_dtype(tensor.compute_dtype, plan.recipe.dtype)
    return Change(name=tensor.name, how="fold", dtype=dtype, source=tensor)


def _settled(change: Change) -> Change | None:
    """`change`, none where it changes nothing: of a tensor from which all vectors have moved."""
    if change.how != "fold" or change.scales:
        return change
    if change.source.computed is not None:
        return replace(change, how="dequantize")
    return None if change.dtype == change.source.dtype else replace(change, how="cast")
