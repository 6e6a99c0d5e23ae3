"""Adapters + checkpoint → Plan: one row a changed tensor. Every refusal is made here, nothing is decided later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.combine import Combine, combine_vectors
from ia3_export.adapters.model import Adapter
from ia3_export.base_match import base_warnings
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor, count_elements, same_bytes, tensor_bytes
from ia3_export.config_edits import can_untie, check_vocabulary, edit_config
from ia3_export.errors import IA3ExportError, NotFinite, Refused, Unsupported, UsageError
from ia3_export.fold import FLOAT_DTYPES, Array, Scale, make_scale, round_vector
from ia3_export.keeping import Folds, Kept, KeptSite, keep_codes
from ia3_export.quantization.detection import Quantization, dense_view, find_quantization
from ia3_export.quantization.settings import exclude, promote, with_settings, without_settings
from ia3_export.resolve import Placement, Resolution, resolve

Cast = Literal["peft", "peft-low-mem"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
#: What becomes of a quantized base: dense; its scales folded, or refused; its scales folded, dense where that fails.
Quantized = Literal["dequantize", "keep", "keep-or-dense"]
How = Literal["fold", "replace", "add", "untie", "cast", "dequantize", "rewrite"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {stored: name for name, stored in _DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One tensor of the output that is not byte for byte the base's.

    `source` holds the bytes to start from (the base's or the adapter's), `scales` are folded into them in order.
    `folds` names them for people: ``adapter: module (output)``.
    """

    name: str
    how: How
    dtype: str
    source: StoredTensor
    scales: tuple[Scale, ...]
    folds: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the output."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that a merge will do, as plain data. `config` is the output's ``config.json`` if it must differ.

    `base` is what is stored. Of a quantized base `dense` is what it stands for, and the output has no `dropped` tensors.
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
    changes: Mapping[str, Change]
    dropped: frozenset[str]
    config: Mapping[str, Any] | None
    config_edits: tuple[str, ...]
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
) -> Plan:
    """Decide what a merge of `adapters` (in order) into `base` changes.

    Refusals are collected in ``Plan.problems``. Raises `UsageError` for weights that do not fit `combine`.
    """
    _check_weights(adapters, combine, weights)
    if quantized != "dequantize" and dtype != "auto":
        raise UsageError(
            f"--dtype {dtype} and --quantized {quantized} exclude each other",
            hint="what stays quantized has no dtype; --quantized dequantize writes it in one",
        )
    quantization = find_quantization(base)
    dense = dense_view(base, quantization)
    resolutions = [
        resolve(a, dense, allow_missing=allow_missing, allow_unused=allow_unused) for a in adapters
    ]
    problems = [*quantization.problems, *(p for r in resolutions for p in r.problems)]
    problems += [p for adapter in adapters for p in _not_finite(adapter)]
    warnings = [w for a in adapters for w in base_warnings(a, base, quantization)]
    warnings += [*quantization.warnings, *(w for r in resolutions for w in r.warnings)]
    changes: dict[str, Change] = {}
    dropped: frozenset[str] = frozenset()
    kept: Kept | None = None
    if not problems:
        try:
            _replace_tensors(resolutions, dense, changes, dtype)
            _fold_vectors(resolutions, dense, changes, combine, weights, cast, dtype)
            _write_ties(resolutions, dense, changes, dtype, warnings)
            if quantized == "dequantize" or not quantization.packed:
                _cast_rest(dense, changes, dtype)
                dropped = frozenset(base.tensors.keys() - dense.tensors.keys())
            else:
                kept = _keep(base, dense, quantization, changes, quantized)
                dropped = frozenset(kept.drops)
                problems += _refusals(kept)
                warnings += kept.warnings
        except IA3ExportError as error:
            problems.append(error)
    adjusted, written = base.config, str(dtype)
    if quantization.packed and base.config is not None:
        if quantized == "dequantize":
            adjusted = without_settings(base.config)
            written = dtype if dtype != "auto" else _NAMES[quantization.kept]
        elif kept is not None:
            adjusted = _adjust(base, quantization, kept, changes, problems)
    config, edits = edit_config(resolutions, base, written, adjusted, warnings)
    shapes = {name: tensor.shape for name, tensor in dense.tensors.items()}
    shapes |= {name: change.shape for name, change in changes.items()}
    problems += check_vocabulary(resolutions, shapes, config)
    classes = [r.runtime.class_name for r in resolutions if r.runtime is not None]
    return Plan(
        base, dense, quantization, quantized, tuple(adapters), combine, tuple(weights), cast, dtype, allow_missing,
        allow_unused, changes, dropped, config, tuple(edits), tuple(kept.sites) if kept else (), classes[0] if classes else None, tuple(dict.fromkeys(warnings)), tuple(problems),
    )  # fmt: skip


def written_dtype(stored: str, dtype: Dtype) -> str:
    """The dtype in which a tensor stored as `stored` is written under the ``--dtype`` policy."""
    return stored if dtype == "auto" or stored not in FLOAT_DTYPES else _DTYPES[dtype]


def _check_weights(adapters: Sequence[Adapter], combine: Combine, weights: Sequence[float]) -> None:
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


def _not_finite(adapter: Adapter) -> list[IA3ExportError]:
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


def _replace_tensors(
    resolutions: Sequence[Resolution], base: Checkpoint, changes: dict[str, Change], dtype: Dtype
) -> None:
    """Heads, embeddings and other tensors that the adapters bring, in the dtype of what they replace."""
    owners: dict[str, Resolution] = {}
    for result in resolutions:
        for name, target in result.extras.items():
            tensor = result.adapter.extras[name]
            if target in owners and not same_bytes(changes[target].source, tensor):
                raise Refused(
                    f"{owners[target].adapter.name} and {result.adapter.name} both bring {target}, and they differ",
                    hint="merge the adapters one at a time, or drop the head from one of them",
                )
            stored = base.tensors.get(target)
            kept = stored.kept if stored is not None else base.main_dtype
            if tensor.dtype not in FLOAT_DTYPES or kept not in FLOAT_DTYPES:
                kept = tensor.dtype
            how: How = "replace" if stored is not None else "add"
            owners[target] = result
            changes[target] = Change(
                target, how, written_dtype(kept, dtype), tensor, (), (f"{result.adapter.name}: {name}",)
            )


def _fold_vectors(
    resolutions: Sequence[Resolution],
    base: Checkpoint,
    changes: dict[str, Change],
    combine: Combine,
    weights: Sequence[float],
    cast: Cast,
    dtype: Dtype,
) -> None:
    if combine == "product":
        for result in resolutions:
            vectors = {key: p.site.vector for key, p in result.placements.items()}
            _lay(result, vectors, result.placements, base, changes, cast, dtype, result.adapter.name)
        return
    union: dict[str, Placement] = {}
    for result in resolutions:
        for key, placement in result.placements.items():
            first = union.setdefault(key, placement)
            if first.site.direction != placement.site.direction:
                raise Refused(
                    f"one adapter scales the input of {placement.site.module}, another its output",
                    hint=f"--combine {combine} needs the same side; --combine product folds both",
                )
    vectors = {}
    for key, placement in union.items():
        weight = base.tensors.get(placement.parts[0].source)
        stored = weight.kept if weight is not None else base.main_dtype
        parts = [r.placements[key].site.vector if key in r.placements else None for r in resolutions]
        vectors[key] = combine_vectors(parts, weights, combine, stored)
    label = " + ".join(f"{w:g} {r.adapter.name}" for w, r in zip(weights, resolutions, strict=True))
    _lay(resolutions[0], vectors, union, base, changes, cast, dtype, label)


def _lay(
    result: Resolution,
    vectors: Mapping[str, Array],
    placements: Mapping[str, Placement],
    base: Checkpoint,
    changes: dict[str, Change],
    cast: Cast,
    dtype: Dtype,
    label: str,
) -> None:
    """Append the scales of one adapter (or of one combination) to the rows of the plan."""
    experts: dict[str, tuple[Array, str]] = {}
    for key, placement in placements.items():
        site, vector = placement.site, vectors[key]
        for part in placement.parts:
            note = f"{label}: {site.module} ({site.direction}put)"
            if part.kind == "expert":
                experts[site.module] = (vector, site.direction)
            elif part.kind == "converted":
                stored = result.runtime.converted[part.tensor][0] if result.runtime else part.tensor
                factors = _factors(vector, base.tensors[stored].kept, cast)
                laid = make_scale(factors, part.shape, site.direction, part.layout)
                _spread(result, part.tensor, _expand(laid, part.shape), base, changes, dtype, note)
            else:
                source = changes[part.tensor].source if part.tensor in changes else base.tensors[part.source]
                factors = _factors(vector, base.tensors[part.source].kept, cast)
                scale = make_scale(factors, part.shape, site.direction, part.layout)
                how: How = "fold" if part.tensor in base.tensors else "untie"
                _append(changes, part.tensor, how, base.tensors[part.source].kept, source, scale, note, dtype)
    if experts and result.runtime is not None:
        from ia3_export.conversions import fused_multiplier

        multipliers, understood = fused_multiplier(result.runtime.rules, experts)
        if set(experts) - understood:
            first = min(set(experts) - understood)
            raise Unsupported(
                f"{first} is part of a fused expert parameter whose packing is not understood",
                hint="save the base with its experts apart (transformers 4 layout), and merge into that",
            )
        for entry, multiplier in multipliers.items():
            stored = (result.runtime.converted.get(entry) or (result.runtime.stored[entry],))[0]
            multiplier = _factors(multiplier.reshape(-1), base.tensors[stored].kept, cast)
            multiplier = multiplier.reshape(result.runtime.shapes[entry])
            _spread(result, entry, multiplier, base, changes, dtype, f"{label}: experts of {entry}")


def _spread(
    result: Resolution,
    entry: str,
    multiplier: Array,
    base: Checkpoint,
    changes: dict[str, Change],
    dtype: Dtype,
    note: str,
) -> None:
    from ia3_export.conversions import spread

    runtime = result.runtime
    assert runtime is not None
    if entry in runtime.stored:
        parts = {runtime.stored[entry]: multiplier.reshape(-1)}
    else:
        sources = runtime.converted[entry]
        siblings = [name for name, keys in runtime.converted.items() if keys == sources]
        parts = spread(runtime.rules, entry, sources, siblings, multiplier, base.tensors)
    for stored, factors in parts.items():
        if (factors != 1).any():
            tensor = base.tensors[stored]
            source = changes[stored].source if stored in changes else tensor
            _append(changes, stored, "fold", tensor.kept, source, Scale(factors, 1), note, dtype)


def _append(
    changes: dict[str, Change],
    name: str,
    how: How,
    kept: str,
    source: StoredTensor,
    scale: Scale,
    note: str,
    dtype: Dtype,
) -> None:
    before = changes.get(name)
    if before is None:
        changes[name] = Change(name, how, written_dtype(kept, dtype), source, (scale,), (note,))
    else:
        changes[name] = Change(
            name, before.how, before.dtype, before.source, (*before.scales, scale), (*before.folds, note)
        )


def _factors(vector: Array, stored: str, cast: Cast) -> Array:
    """The vector in the precision that PEFT folds it in (see `Plan.cast`)."""
    if cast == "peft-low-mem":
        return round_vector(vector, stored)
    with np.errstate(over="ignore", under="ignore"):
        return vector.astype("<f8" if stored == "F64" else "<f4")


def _expand(scale: Scale, shape: tuple[int, ...]) -> Array:
    element = np.arange(count_elements(shape))
    return scale.factors[element // scale.inner % len(scale.factors)].reshape(shape)


def _write_ties(
    resolutions: Sequence[Resolution],
    base: Checkpoint,
    changes: dict[str, Change],
    dtype: Dtype,
    warnings: list[str],
) -> None:
    """Where a tensor leaves a tie, every other name of the tie that the file lacks is written with the base's
    own bytes, since without the tie transformers would look for it."""
    for result in resolutions:
        if not result.untied or result.runtime is None:
            continue
        runtime = result.runtime
        warnings.append(f"untied: {', '.join(result.untied)} no longer shares its tensor")
        for target, source in runtime.ties.items():
            name = runtime.stored.get(target, target)
            stored = runtime.stored.get(source)
            if target in runtime.stored or name in changes or stored is None or not can_untie(result, base):
                continue
            tensor = base.tensors[stored]
            changes[name] = Change(
                name, "untie", written_dtype(tensor.kept, dtype), tensor, (), (f"copy of {stored}",)
            )


def _keep(
    base: Checkpoint,
    dense: Checkpoint,
    quantization: Quantization,
    changes: dict[str, Change],
    quantized: Quantized,
) -> Kept:
    """Replace the `changes` of quantized weights by changes of their scales."""
    folds, replaced = [], set()
    for name in [name for name in changes if name in quantization.packed]:
        packed = quantization.packed[name]
        if changes[name].how == "fold":
            change = changes.pop(name)
            folds.append(Folds(packed, change.scales, change.folds))
        else:  # the adapter brings the whole weight
            replaced.add(name)
    kept = keep_codes(folds, base, dense, quantization, or_dense=quantized == "keep-or-dense")
    for name in replaced:
        kept.dense.add(name)
        kept.drops |= quantization.packed[name].parts.keys() - {name}
    for name, tensor in kept.tensors.items():
        before = changes.get(name)
        if before is not None:
            changes[name] = Change(
                name, before.how, before.dtype, before.source, (*before.scales, *tensor.scales),
                (*before.folds, *tensor.notes),
            )  # fmt: skip
        else:
            how: How = "fold" if tensor.notes else "rewrite"
            changes[name] = Change(name, how, tensor.dtype, tensor.source, tensor.scales, tensor.notes)
    return kept


def _refusals(kept: Kept) -> list[IA3ExportError]:
    return [
        Refused(
            f"{site.weight} ({site.format}) cannot be kept quantized: {site.reason}",
            hint="--quantized keep-or-dense writes such weights dense, --quantized dequantize all of them",
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
) -> Mapping[str, Any] | None:
    """``config.json`` with quantization settings that are true of the output."""
    settings: Mapping[str, Any] = quantization.settings
    if kept.groups:
        settings = promote(settings, kept.groups)
    if kept.dense:
        packed = {
            part
            for name, p in quantization.packed.items()
            if name not in kept.dense
            for part in (name, *p.parts)
        }
        dense = {
            name.removesuffix(".weight")
            for name, tensor in {**base.tensors, **{n: c.source for n, c in changes.items()}}.items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and name not in packed
        }
        edited = exclude(settings, [name.removesuffix(".weight") for name in sorted(kept.dense)], dense)
        if isinstance(edited, str):
            problems.append(
                Refused(
                    f"{min(kept.dense)} would have to be dense, and {edited}",
                    hint="--quantized dequantize writes every weight dense",
                )
            )
            return base.config
        settings = edited
    assert base.config is not None
    if settings == quantization.settings:
        return base.config
    return with_settings(base.config, settings)


def _cast_rest(base: Checkpoint, changes: dict[str, Change], dtype: Dtype) -> None:
    for name, tensor in base.tensors.items():
        written = written_dtype(tensor.kept, dtype)
        if name not in changes and (written != tensor.dtype or tensor.computed is not None):
            how: How = "cast" if tensor.computed is None else "dequantize"
            changes[name] = Change(name, how, written, tensor, (), ())
