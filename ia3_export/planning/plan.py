"""Adapters + checkpoint → Plan: one row a changed tensor. Every refusal is made here, nothing is decided later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.combine import Combine, linear_warnings
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import IA3ExportError, NotFinite, Refused, UsageError
from ia3_export.planning.base_match import base_warnings, folded_before, merge_warnings
from ia3_export.planning.changes import (
    DTYPES,
    Cast,
    Change,
    Dtype,
    cast_rest,
    check_gguf,
    fold_vectors,
    replace_tensors,
    write_ties,
)
from ia3_export.planning.companions import Companions, TokenizerChoice, choose_companions
from ia3_export.planning.config_edits import check_vocabulary, edit_config, output_class
from ia3_export.planning.keep_quantized import Folds, Kept, KeptSite, keep_codes, uniform
from ia3_export.planning.resolve import resolve
from ia3_export.quantization.activations import Output, follow
from ia3_export.quantization.detection import Quantization, dense_view, find_quantization
from ia3_export.quantization.packed import split_vectors
from ia3_export.quantization.settings import (
    ONLY_BLOCKS,
    Mixture,
    exclude,
    exclude_beside,
    mixture_warnings,
    promote,
    with_settings,
    without_settings,
)

#: What becomes of a quantized base: dense; its scales folded, or refused; its scales folded, dense where that fails.
Quantized = Literal["dequantize", "keep", "keep-or-dense"]

_NAMES = {stored: name for name, stored in DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that a merge will do, as plain data. `config` is the output's ``config.json`` if it must differ.

    `companions` are the files beside the weights. `base` is what is stored. Of a quantized base `dense` is what it stands for, the output
    has no `dropped` tensors, and `settings_files` are side files of the quantizer with other contents.
    """

    base: Checkpoint
    dense: Checkpoint
    quantization: Quantization
    quantized: Quantized
    adapters: tuple[Adapter, ...]
    combine: Combine
    weights: tuple[float, ...]
    cast: Cast
    dtype: Dtype
    allow_missing: bool
    allow_unused: bool
    tokenizer: TokenizerChoice
    companions: Companions
    changes: Mapping[str, Change]
    dropped: frozenset[str]
    config: Mapping[str, Any] | None
    config_edits: tuple[str, ...]
    settings_files: Mapping[str, Mapping[str, Any]]
    kept: tuple[KeptSite, ...]
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
        return bool(self.quantization.packed) and self.quantized == "dequantize"

    @property
    def touched_shards(self) -> tuple[str, ...]:
        """Names of the base's shards that hold a changed tensor."""
        names = {*self.changes, *self.dropped}
        return tuple(s.name for s in self.base.shards if any(t.name in names for t in s.tensors))


def make_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    combine: Combine = "product",
    weights: Sequence[float] = (),
    cast: Cast = "peft",
    dtype: Dtype = "auto",
    quantized: Quantized = "dequantize",
    allow_missing: bool = False,
    allow_unused: bool = False,
    tokenizer: TokenizerChoice = "auto",
) -> Plan:
    """Decide what a merge of `adapters` (in order) into `base` changes.

    Refusals are collected in ``Plan.problems``. Raises `UsageError` for weights that do not fit `combine`.
    """
    check_weights(adapters, combine, weights)
    if quantized != "dequantize" and dtype != "auto":
        raise UsageError(
            f"--dtype {dtype} and --quantized {quantized} exclude each other",
            hint="what stays quantized has no dtype; --quantized dequantize writes it in one",
        )
    if base.is_gguf and quantized == "dequantize":
        quantized = "keep"  # GGUF in, GGUF out
    quantization = find_quantization(base)
    dense = dense_view(base, quantization)
    resolutions = [
        resolve(a, dense, allow_missing=allow_missing, allow_unused=allow_unused) for a in adapters
    ]
    problems = [*quantization.problems, *(p for r in resolutions for p in r.problems)]
    problems += [p for adapter in adapters for p in not_finite(adapter)]
    problems += [p for adapter in adapters if (p := folded_before(adapter, base)) is not None]
    warnings = linear_warnings([r.adapter for r in resolutions], weights) if combine == "linear" else []
    warnings += [*merge_warnings(base), *(w for a in adapters for w in base_warnings(a, base, quantization))]
    warnings += [*quantization.warnings, *(w for r in resolutions for w in r.warnings)]
    changes: dict[str, Change] = {}
    dropped: frozenset[str] = frozenset()
    kept: Kept | None = None
    if not problems:
        try:
            replace_tensors(resolutions, dense, changes, dtype)
            fold_vectors(resolutions, dense, changes, combine, weights, cast, dtype)
            write_ties(resolutions, dense, changes, dtype, warnings)
            if quantized == "dequantize" or not quantization.packed:
                cast_rest(dense, changes, dtype)
                dropped = frozenset(base.tensors.keys() - dense.tensors.keys())
            else:
                kept = _keep(base, dense, quantization, changes, quantized)
                dropped = frozenset(kept.drops)
                problems += _refusals(kept, base)
                warnings += kept.warnings
            if base.is_gguf:
                check_gguf(quantization, changes, dtype)
        except IA3ExportError as error:
            problems.append(error)
    # the configuration of a GGUF file is its metadata, which stays
    adjusted, written = (None if base.is_gguf else base.config), str(dtype)
    beside: Mapping[str, Mapping[str, Any]] = {}
    if quantization.packed and adjusted is not None:
        if quantized == "dequantize":
            adjusted = without_settings(adjusted)
            written = dtype if dtype != "auto" else _NAMES[quantization.kept]
        elif kept is not None:
            adjusted, beside = _adjust(base, quantization, kept, changes, problems, warnings)
    config, edits = edit_config(resolutions, base, written, adjusted, warnings)
    shapes = {name: tensor.shape for name, tensor in dense.tensors.items()}
    shapes |= {name: change.shape for name, change in changes.items()}
    if not problems:
        problems += check_vocabulary(resolutions, shapes, dense.config if config is not None else None)
    companions = choose_companions(base, [r.adapter for r in resolutions], tokenizer, config or base.config)
    warnings += companions.warnings
    problems += companions.problems
    return Plan(
        base, dense, quantization, quantized, tuple(r.adapter for r in resolutions), combine, tuple(weights), cast, dtype, allow_missing,
        allow_unused, tokenizer, companions, changes, dropped, config, tuple(edits), beside, tuple(kept.sites) if kept else (), output_class(resolutions), tuple(dict.fromkeys(warnings)), tuple(problems),
    )  # fmt: skip


def check_weights(adapters: Sequence[Adapter], combine: Combine, weights: Sequence[float]) -> None:
    """Raise `UsageError` for `weights` that do not fit `combine`, and for an adapter that is given twice."""
    if combine == "product" and weights:
        raise UsageError("--weights belongs to --combine linear or delta", hint="product has no weights")
    if combine != "product" and len(weights) != len(adapters):
        raise UsageError(
            f"--combine {combine} needs one weight per adapter: {len(adapters)} adapters, {len(weights)} weights",
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


def _keep(
    base: Checkpoint,
    dense: Checkpoint,
    quantization: Quantization,
    changes: dict[str, Change],
    quantized: Quantized,
) -> Kept:
    """Replace the `changes` of quantized weights by changes of their scales."""
    effects = follow(_outputs(quantization, changes), base, quantization.packed)
    folds, replaced = [], set()
    for name in [name for name in changes if name in quantization.packed]:
        packed = quantization.packed[name]
        if changes[name].how == "fold":
            change = changes.pop(name)
            folds.append(Folds(packed, change.scales, change.folds, effects.unknown.get(packed.module, "")))
        else:  # the adapter brings the whole weight
            replaced.add(name)
    folded = {fold.packed.module for fold in folds}
    folds += [
        Folds(packed, (), (), effects.unknown[packed.module])
        for name, packed in quantization.packed.items()
        if packed.module in effects.unknown and packed.module not in folded and name not in replaced
    ]
    staying = {name: packed for name, packed in quantization.packed.items() if name not in replaced}
    kept = keep_codes(
        folds, base, dense, replace(quantization, packed=staying), or_dense=quantized == "keep-or-dense"
    )
    for name in replaced:
        kept.dense.add(name)
        kept.drops |= quantization.packed[name].parts.keys() - {name}
    for growth in effects.grown:
        if growth.tensor not in kept.drops:
            scale, tensor = (uniform(growth.factor),), base.tensors[growth.tensor]
            before = kept.changes.get(growth.tensor) or Change(
                tensor.name, "fold", tensor.dtype, tensor, (), ()
            )
            kept.changes[growth.tensor] = before.with_folds(scale, growth.notes)
    kept.warnings += effects.warnings
    for name, change in kept.changes.items():
        earlier = changes.get(name)
        changes[name] = change if earlier is None else earlier.with_folds(change.scales, change.folds)
    return kept


def _outputs(quantization: Quantization, changes: Mapping[str, Change]) -> dict[str, Output]:
    """The vectors on outputs that the `changes` of dense weights fold, by module."""
    found = {}
    conv1d = any(packed.conv1d for packed in quantization.packed.values())
    for name, change in changes.items():
        if name.endswith(".weight") and change.scales and len(change.shape) == 2:
            vectors = split_vectors(change.shape, change.scales, conv1d=conv1d)
            if not isinstance(vectors, str) and vectors[0] is not None:
                found[name.removesuffix(".weight")] = Output(vectors[0], change.folds)
    return found


def _refusals(kept: Kept, base: Checkpoint) -> list[IA3ExportError]:
    others = "" if base.is_gguf else ", --quantized dequantize all of them"
    return [
        Refused(
            f"{site.weight} ({site.format}) cannot be kept quantized: {site.reason}",
            hint=f"--quantized keep-or-dense writes such weights dense{others}",
        )
        for site in kept.sites
        if site.outcome == "refused"
    ]


def _adjust(
    base: Checkpoint,
    quantization: Quantization,
    kept: Kept,
    changes: Mapping[str, Change],
    problems: list[IA3ExportError],
    warnings: list[str],
) -> tuple[Mapping[str, Any] | None, Mapping[str, Mapping[str, Any]]]:
    """``config.json`` and the quantizer's side files with settings that are true of the output."""
    assert base.config is not None
    settings: Mapping[str, Any] = quantization.settings
    beside: Mapping[str, Mapping[str, Any]] = {}
    if kept.groups:
        settings = promote(settings, kept.groups)
    method = str(settings.get("quant_method"))
    mixture = _mixture(base, quantization, kept, changes, method)
    if mixture.leaving:
        edited, files = exclude(settings, mixture), exclude_beside(base, method, mixture)
        if isinstance(edited, str) or isinstance(files, str):
            if not kept.dense:
                return base.config, {}
            problems.append(
                Refused(
                    f"{min(kept.dense)} would have to be dense, and {edited if isinstance(edited, str) else files}",
                    hint="--quantized dequantize writes every weight dense",
                )
            )
            return base.config, {}
        settings, beside = edited, files
        if kept.dense:
            warnings += mixture_warnings(method, mixture)
    if settings == quantization.settings:
        return base.config, beside
    return with_settings(base.config, settings), beside


def _mixture(
    base: Checkpoint, quantization: Quantization, kept: Kept, changes: Mapping[str, Change], method: str
) -> Mixture:
    """What is quantized in the output. A head that the adapter brings leaves too, for methods that quantize every projection."""
    staying = {name: packed for name, packed in quantization.packed.items() if name not in kept.dense}
    packed = {part for name, p in staying.items() for part in (name, *p.parts)}
    dense = {
        name.removesuffix(".weight")
        for name, tensor in {**base.tensors, **{n: c.source for n, c in changes.items()}}.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in packed
    }
    if "lm_head.weight" not in packed:  # a tied head has no tensor, and must not be quantized either
        dense.add("lm_head")
    leaving = {name.removesuffix(".weight") for name in kept.dense}
    if method not in ONLY_BLOCKS:
        added = {name.removesuffix(".weight") for name, change in changes.items() if change.how == "add"}
        leaving |= added & dense
    return Mixture(leaving, [p.module for p in staying.values()], dense)
