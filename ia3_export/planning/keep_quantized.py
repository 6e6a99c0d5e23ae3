"""``--quantized keep``: the vectors of a dense plan, folded into the stored scales of a quantized base
instead.

Starts from the changes that a merge into the dequantized base would make: those of quantized weights become
changes of their scales. What cannot be kept is written dense or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ia3_export.errors import IA3ExportError, Refused
from ia3_export.fold import Scale, make_scale
from ia3_export.planning.changes import Change
from ia3_export.planning.quantized_placement import (
    Context,
    Laid,
    WeightFolds,
    WeightOutcome,
    make_context,
    place,
    single_precision,
    start_change,
    uniform,
)
from ia3_export.quantization.activations import OutputFactors, follow
from ia3_export.quantization.base import Base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.packed import BlockScales, CannotKeep, Scales, Side, split_vectors
from ia3_export.quantization.rounding import laid_over
from ia3_export.words import Quantized


@dataclass(slots=True, kw_only=True)
class Kept:
    """What `keep_codes` decided: `changes` of stored tensors by name, stored tensors that the output `drops`,
    what became `dense`, and the `groups` of the configuration whose weights now have a scale a channel."""

    outcomes: list[WeightOutcome] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)
    drops: set[str] = field(default_factory=set)
    dense: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def keep_scales(base: Base, changes: dict[str, Change], quantized: Quantized) -> Kept:
    """Replace the `changes` of quantized weights by changes of their scales."""
    quantization, stored = base.quantization, base.stored
    effects = follow(_outputs(quantization, changes), stored, quantization.packed)
    weights, replaced = [], set()
    for name in [name for name in changes if name in quantization.packed]:
        packed = quantization.packed[name]
        if changes[name].how == "fold":
            change = changes.pop(name)
            weights.append(
                WeightFolds(packed, change.scales, change.folds, effects.unknown.get(packed.module))
            )
        else:  # the adapter brings the whole weight
            replaced.add(name)
    folded = {weight.packed.module for weight in weights}
    weights += [
        WeightFolds(packed, (), (), effects.unknown[packed.module])
        for name, packed in quantization.packed.items()
        if packed.module in effects.unknown and packed.module not in folded and name not in replaced
    ]
    staying = {name: packed for name, packed in quantization.packed.items() if name not in replaced}
    kept = keep_codes(
        weights,
        replace(base, quantization=replace(quantization, packed=staying)),
        or_dense=quantized == "keep-or-dense",
    )
    for name in replaced:
        kept.dense.add(name)
        kept.drops |= quantization.packed[name].parts.keys() - {name}
    for growth in effects.grown:
        if growth.tensor not in kept.drops:
            scale, tensor = (uniform(growth.factor),), stored.tensors[growth.tensor]
            before = kept.changes.get(growth.tensor) or Change(
                name=tensor.name, how="fold", dtype=tensor.dtype, source=tensor
            )
            kept.changes[growth.tensor] = before.with_folds(scale, growth.folds)
    kept.warnings += effects.warnings
    for name, change in kept.changes.items():
        earlier = changes.get(name)
        changes[name] = change if earlier is None else earlier.with_folds(change.scales, change.folds)
    return kept


def _outputs(quantization: Quantization, changes: Mapping[str, Change]) -> dict[str, OutputFactors]:
    """The vectors on outputs that the `changes` of dense weights fold, by module."""
    found = {}
    conv1d = any(packed.conv1d for packed in quantization.packed.values())
    for name, change in changes.items():
        if name.endswith(".weight") and change.scales and len(change.shape) == 2:
            with suppress(CannotKeep):
                outputs, _ = split_vectors(change.shape, change.scales, conv1d=conv1d)
                if outputs is not None:
                    found[name.removesuffix(".weight")] = OutputFactors(outputs, change.folds)
    return found


def refusals(kept: Kept, base: Base) -> list[IA3ExportError]:
    """A `Refused` for every weight that ``--quantized keep`` cannot keep."""
    others = "" if base.stored.is_gguf else ", --quantized dequantize all of them"
    return [
        Refused(
            f"{outcome.weight} ({outcome.format}) cannot be kept quantized: {outcome.reason}",
            hint=f"--quantized keep-or-dense writes such weights dense{others}",
        )
        for outcome in kept.outcomes
        if outcome.kind == "refused"
    ]


def keep_codes(weights: Iterable[WeightFolds], base: Base, *, or_dense: bool) -> Kept:
    """Find the scales that take the vectors on `weights`.

    Reads scales that are stored in 16 bits, to say how much they are rounded. With `or_dense` a weight that
    cannot be kept becomes dense, else it is listed as refused.
    """
    context = make_context(base)
    kept = Kept()
    for weight in weights:
        try:
            outcome, placed = place(weight, context)
        except CannotKeep as why:
            outcome = _without_scales(weight, str(why), base, kept if or_dense else None)
        else:
            context.placed.update(placed)
        kept.outcomes.append(outcome)
    _write_placed(context, kept)
    _promote_groups(base.quantization, kept)
    coarse = [outcome for outcome in kept.outcomes if outcome.error > 2.0**-9]
    if coarse:
        kept.warnings.append(
            f"{len(coarse)} weights have scales in bfloat16, or ones that lose precision: rounded by up to "
            f"{max(outcome.error for outcome in coarse):.1e}, which may be more than a dense weight loses"
        )
    kept.warnings += _sign_warnings([*context.placed.rows.values(), *context.placed.columns.values()])
    return kept


def _without_scales(weight: WeightFolds, reason: str, base: Base, kept: Kept | None) -> WeightOutcome:
    """The outcome for a weight whose scales do not take its vectors: dense in `kept`, or refused."""
    packed = weight.packed
    outcome = WeightOutcome(
        weight=packed.name, format=packed.format, kind="refused", reason=reason, folds=weight.folds
    )
    if kept is None:
        return outcome
    tensor = base.dense.tensors[packed.name]
    kept.changes[packed.name] = start_change(tensor, tensor.compute_dtype, weight.scales, weight.folds)
    kept.drops |= packed.parts.keys() - {packed.name}
    kept.dense.add(packed.name)
    return replace(outcome, kind="dense", tensors=(packed.name,))


def _write_placed(context: Context, kept: Kept) -> None:
    """The changes of stored tensors that everything placed makes."""
    packed, placed = context.base.quantization.packed, context.placed
    for name, laid in placed.rows.items():
        if name in kept.dense:  # a vector of its neighbour was moved onto it before
            scale = make_scale(single_precision(laid.factors), packed[name].shape, "out", context.layout)
            kept.changes[name] = kept.changes[name].with_folds((scale,), laid.folds)
        else:
            _emit(packed[name].on_output, laid, kept)
    for name, laid in placed.columns.items():
        _emit(packed[name].on_input, laid, kept)
    kept.changes.update(placed.others)


def _emit(side: Side, laid: Laid, kept: Kept) -> None:
    factors = single_precision(laid.factors)
    if isinstance(side, BlockScales):
        tensor = side.fold(factors)
        kept.changes[tensor.name] = start_change(tensor, tensor.dtype, (), laid.folds)
        return
    assert isinstance(side, Scales)
    for scale, dtype in zip(side.tensors, laid.dtypes, strict=True):
        before = kept.changes.get(scale.stored.name) or start_change(scale.stored, dtype)
        folded = Scale(laid_over(scale, factors), scale.inner)
        kept.changes[scale.stored.name] = replace(before, how="fold", dtype=dtype).with_folds(
            (folded,), laid.folds
        )
    for tensor in side.rewrites:
        kept.changes[tensor.name] = start_change(tensor, tensor.dtype)
    kept.drops |= set(side.drops)
    if side.group is not None:
        kept.groups.add(side.group)


def _promote_groups(quantization: Quantization, kept: Kept) -> None:
    """All weights of a group of the configuration get a scale a channel once one has."""
    for packed in quantization.packed.values():
        side = packed.on_output
        if not isinstance(side, Scales) or side.group not in kept.groups or packed.name in kept.dense:
            continue
        for scale in side.tensors:
            kept.changes.setdefault(scale.stored.name, start_change(scale.stored, scale.stored.dtype))


def _sign_warnings(laid: Iterable[Laid]) -> list[str]:
    factors = [row.factors for row in laid]
    negative = sum(int((f < 0).sum()) for f in factors)
    zero = sum(int((f == 0).sum()) for f in factors)
    if not negative and not zero:
        return []
    found = " and ".join(f"{n} {what}" for n, what in ((negative, "negative"), (zero, "zero")) if n)
    return [
        (
            f"{found} scales are written: the libraries tried on CPUs read them rightly, kernels of GPUs "
            "were not tried"
        )
    ]
