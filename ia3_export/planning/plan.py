"""Adapters + Base → Plan: one `Change` a tensor.

Every refusal is made here, nothing is decided later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ia3_export.adapters.combine import linear_warnings
from ia3_export.adapters.model import Adapter
from ia3_export.errors import IA3ExportError, NotFinite, Refused, UsageError
from ia3_export.planning.base_match import base_warnings, folded_before, merge_warnings
from ia3_export.planning.changes import (
    Change,
    Ledger,
    cast_rest,
    check_gguf,
    fold_vectors,
    replace_tensors,
    write_ties,
)
from ia3_export.planning.companions import Companions, choose_companions
from ia3_export.planning.config_edits import check_vocabulary, edit_config, output_class
from ia3_export.planning.keep_quantized import Kept, keep_scales, refusals
from ia3_export.planning.placement import Resolution
from ia3_export.planning.quantized_placement import WeightOutcome
from ia3_export.planning.quantized_settings import adjust_settings
from ia3_export.planning.recipe import Recipe
from ia3_export.planning.resolve import resolve
from ia3_export.quantization.base import Base
from ia3_export.quantization.config import without_settings
from ia3_export.words import TORCH_NAMES, Combine


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Plan:
    """All that a merge will do, as plain data. `config` is the output's ``config.json`` if it must differ.

    `companions` are the files beside the weights. Of a quantized base the output has no `dropped` tensors,
    and `settings_files` are side files of the quantizer with other contents.
    """

    base: Base
    recipe: Recipe
    adapters: tuple[Adapter, ...]
    changes: Mapping[str, Change]
    dropped: frozenset[str]
    outcomes: tuple[WeightOutcome, ...]
    companions: Companions
    config: Mapping[str, Any] | None
    config_edits: tuple[str, ...]
    settings_files: Mapping[str, Mapping[str, Any]]
    model_class: str | None
    warnings: tuple[str, ...]
    problems: tuple[IA3ExportError, ...]

    def raise_problems(self) -> None:
        """Raise the first refusal, counting the others; does nothing when there is none."""
        if not self.problems:
            return
        first = self.problems[0]
        if len(self.problems) > 1:
            raise type(first)(f"{first} (and {len(self.problems) - 1} more problems)", hint=first.hint)
        raise first

    @property
    def dequantizes(self) -> bool:
        """Whether a quantized base becomes a dense output."""
        return self.base.is_quantized and self.recipe.quantized == "dequantize"

    @property
    def touched_shards(self) -> tuple[str, ...]:
        """Names of the base's shards that hold a changed tensor."""
        names = {*self.changes, *self.dropped}
        return tuple(s.name for s in self.base.stored.shards if any(t.name in names for t in s.tensors))


def make_plan(base: Base, adapters: Sequence[Adapter], recipe: Recipe) -> Plan:
    """Decide what a merge of `adapters` (in order) into `base` changes.

    Refusals are collected in ``Plan.problems``. Raises `UsageError` for weights that do not fit
    ``recipe.combine``.
    """
    check_weights(adapters, recipe.combine, recipe.weights)
    stored = base.stored
    asked = recipe.dtype
    if stored.is_gguf and recipe.quantized == "dequantize":
        recipe = replace(recipe, quantized="keep", dtype="auto")  # GGUF in, GGUF out
    resolutions = [
        resolve(a, base.dense, allow_missing=recipe.allow_missing, allow_unused=recipe.allow_unused)
        for a in adapters
    ]
    problems, warnings = _findings(base, adapters, resolutions, recipe)
    ledger = Ledger(base.dense, recipe.dtype, recipe.cast)
    dropped: frozenset[str] = frozenset()
    kept: Kept | None = None
    if not problems:
        try:
            replace_tensors(resolutions, ledger)
            fold_vectors(resolutions, ledger, recipe.combine, recipe.weights)
            warnings += write_ties(resolutions, ledger)
            if recipe.quantized == "dequantize" or not base.is_quantized:
                cast_rest(ledger)
                dropped = frozenset(stored.tensors.keys() - base.dense.tensors.keys())
            else:
                kept = keep_scales(base, ledger.changes, recipe.quantized)
                dropped = frozenset(kept.drops)
                problems += refusals(kept, base)
                warnings += kept.warnings
            if stored.is_gguf:
                check_gguf(base.quantization, ledger.changes, asked)
        except IA3ExportError as error:
            problems.append(error)
    written = _configure(base, recipe, resolutions, ledger.changes, kept)
    warnings += written.warnings
    problems += written.problems
    shapes = {name: tensor.shape for name, tensor in base.dense.tensors.items()}
    shapes |= {name: change.shape for name, change in ledger.changes.items()}
    if not problems:
        problems += check_vocabulary(
            resolutions, shapes, stored.config if written.config is not None else None
        )
    companions = choose_companions(
        stored, [r.adapter for r in resolutions], recipe.tokenizer, written.config or stored.config
    )
    return Plan(
        base=base,
        recipe=recipe,
        adapters=tuple(r.adapter for r in resolutions),
        changes=ledger.changes,
        dropped=dropped,
        outcomes=tuple(kept.outcomes) if kept is not None else (),
        companions=companions,
        config=written.config,
        config_edits=tuple(written.edits),
        settings_files=written.settings_files,
        model_class=output_class(resolutions),
        warnings=tuple(dict.fromkeys([*warnings, *companions.warnings])),
        problems=(*problems, *companions.problems),
    )


def _findings(
    base: Base, adapters: Sequence[Adapter], resolutions: Sequence[Resolution], recipe: Recipe
) -> tuple[list[IA3ExportError], list[str]]:
    """Refusals and warnings that hold whatever is folded."""
    laid = [r.adapter for r in resolutions]
    problems = [*base.quantization.problems, *(p for r in resolutions for p in r.problems)]
    problems += [p for adapter in adapters for p in not_finite(adapter)]
    problems += [p for adapter in laid if (p := folded_before(adapter, base.stored)) is not None]
    warnings = linear_warnings(laid, recipe.weights) if recipe.combine == "linear" else []
    warnings += merge_warnings(base.stored)
    warnings += [w for a in adapters for w in base_warnings(a, base.stored, base.quantization)]
    warnings += [*base.quantization.warnings, *(w for r in resolutions for w in r.warnings)]
    return problems, warnings


@dataclass(slots=True)
class _Configuration:
    """``config.json`` of the output (None: the base's), with its edits, and the quantizer's side files."""

    config: Mapping[str, Any] | None = None
    edits: Sequence[str] = ()
    settings_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[IA3ExportError] = field(default_factory=list)


def _configure(
    base: Base,
    recipe: Recipe,
    resolutions: Sequence[Resolution],
    changes: Mapping[str, Change],
    kept: Kept | None,
) -> _Configuration:
    written = _Configuration()
    # the configuration of a GGUF file is its metadata, which stays
    start, dtype = (None if base.stored.is_gguf else base.stored.config), str(recipe.dtype)
    if base.is_quantized and start is not None:
        if recipe.quantized == "dequantize":
            start = without_settings(start)
            dtype = TORCH_NAMES[base.quantization.compute_dtype] if recipe.dtype == "auto" else dtype
        elif kept is not None:
            try:
                start, written.settings_files = adjust_settings(base, kept, changes, written.warnings)
            except Refused as error:
                written.problems.append(error)
    written.config, written.edits = edit_config(resolutions, base.stored, dtype, start, written.warnings)
    return written


def check_weights(adapters: Sequence[Adapter], combine: Combine, weights: Sequence[float]) -> None:
    """Raise `UsageError` for `weights` that do not fit `combine`, and for an adapter that is given twice."""
    if combine == "product" and weights:
        raise UsageError("--weights belongs to --combine linear or delta", hint="product has no weights")
    if combine != "product" and len(weights) != len(adapters):
        raise UsageError(
            f"--combine {combine} needs one weight per adapter: {len(adapters)} adapters, "
            f"{len(weights)} weights",
            hint="for example --weights " + ",".join(["0.5"] * len(adapters)),
        )
    if not all(np.isfinite(weight) for weight in weights):
        raise UsageError("--weights must be finite numbers", hint="for example --weights 0.7,0.3")
    paths = [adapter.location.path.resolve() for adapter in adapters]
    if len(set(paths)) != len(paths):
        raise UsageError("the same adapter is given twice", hint="its vectors would be applied twice")


def not_finite(adapter: Adapter) -> list[IA3ExportError]:
    """A `NotFinite` for every vector with NaN or infinity in it."""
    found: list[IA3ExportError] = []
    for site in adapter.sites.values():
        bad = np.flatnonzero(~np.isfinite(site.vector))
        if len(bad):
            found.append(
                NotFinite(
                    f"the vector of {site.module} in {adapter.location.given} holds {site.vector[bad[0]]} at "
                    f"element {bad[0]} ({len(bad)} such elements)",
                    hint="training diverged; take an earlier checkpoint of the adapter",
                )
            )
    return found
