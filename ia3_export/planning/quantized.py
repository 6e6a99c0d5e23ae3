"""``--quantized keep`` in a plan: changes of dense weights become changes of scales, and the quantizer's
settings stay true."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ia3_export.errors import IA3ExportError, Refused
from ia3_export.planning.changes import Change
from ia3_export.planning.keep_quantized import Kept, WeightFolds, keep_codes, uniform
from ia3_export.quantization.activations import OutputFactors, follow
from ia3_export.quantization.base import Base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.packed import CannotKeep, split_vectors
from ia3_export.quantization.settings import (
    ONLY_BLOCKS,
    CannotExclude,
    Mixture,
    exclude,
    exclude_beside,
    mixture_warnings,
    promote,
    with_settings,
)
from ia3_export.words import Quantized


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


def adjust_settings(
    base: Base, kept: Kept, changes: Mapping[str, Change], warnings: list[str]
) -> tuple[Mapping[str, Any] | None, Mapping[str, Mapping[str, Any]]]:
    """``config.json`` and the quantizer's side files with settings that are true of the output; what a user
    should know is added to `warnings`. Raises `Refused` where the settings cannot say what would be dense."""
    stored, quantization = base.stored, base.quantization
    assert stored.config is not None
    settings: Mapping[str, Any] = quantization.settings
    beside: Mapping[str, Mapping[str, Any]] = {}
    if kept.groups:
        settings = promote(settings, kept.groups)
    method = str(settings.get("quant_method"))
    mixture = _mixture(base, kept, changes, method)
    if mixture.leaving:
        try:
            settings, beside = exclude(settings, mixture), exclude_beside(stored, method, mixture)
        except CannotExclude as why:
            if not kept.dense:
                return stored.config, {}
            raise Refused(
                f"{min(kept.dense)} would have to be dense, and {why}",
                hint="--quantized dequantize writes every weight dense",
            ) from why
        if kept.dense:
            warnings += mixture_warnings(method, mixture)
    if settings == quantization.settings:
        return stored.config, beside
    return with_settings(stored.config, settings), beside


def _mixture(base: Base, kept: Kept, changes: Mapping[str, Change], method: str) -> Mixture:
    """What is quantized in the output. A head that the adapter brings leaves too, for methods that quantize
    every projection."""
    staying = {name: packed for name, packed in base.quantization.packed.items() if name not in kept.dense}
    packed = {part for name, p in staying.items() for part in (name, *p.parts)}
    dense = {
        name.removesuffix(".weight")
        for name, tensor in {**base.stored.tensors, **{n: c.source for n, c in changes.items()}}.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in packed
    }
    if "lm_head.weight" not in packed:  # a tied head has no tensor, and must not be quantized either
        dense.add("lm_head")
    leaving = {name.removesuffix(".weight") for name in kept.dense}
    if method not in ONLY_BLOCKS:
        added = {name.removesuffix(".weight") for name, change in changes.items() if change.how == "add"}
        leaving |= added & dense
    return Mixture(leaving, [p.module for p in staying.values()], dense)
