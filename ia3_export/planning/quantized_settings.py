"""The quantizer's settings of an output whose base stays quantized, true of what became dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia3_export.errors import Refused
from ia3_export.planning.changes import Change
from ia3_export.planning.keep_quantized import Kept
from ia3_export.quantization.base import Base
from ia3_export.quantization.config import (
    ONLY_BLOCKS,
    CannotExclude,
    Mixture,
    exclude,
    exclude_beside,
    mixture_warnings,
    promote,
    with_settings,
)


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
