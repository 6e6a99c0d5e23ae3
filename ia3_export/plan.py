"""Adapters + checkpoint → Plan: one row a changed tensor. Every refusal is made here, nothing is decided later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.combine import Combine, combine_vectors
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor, count_elements, same_bytes, tensor_bytes
from ia3_export.config_edits import can_untie, check_vocabulary, edit_config
from ia3_export.errors import IA3ExportError, NotFinite, Refused, Unsupported, UsageError
from ia3_export.fold import FLOAT_DTYPES, Array, Scale, make_scale, round_vector
from ia3_export.resolve import Placement, Resolution, resolve

Cast = Literal["peft", "peft-low-mem"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
How = Literal["fold", "replace", "add", "untie", "cast"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_QUANTIZED_SUFFIXES = (
    ".qweight", ".qzeros", ".SCB", ".absmax", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    ".quant_map", "_blocks", ".W_q",
)  # fmt: skip


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
    """All that a merge will do, as plain data. `config` is the output's ``config.json`` if it must differ."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    combine: Combine
    weights: tuple[float, ...]
    cast: Cast
    dtype: Dtype
    allow_missing: bool
    allow_unused: bool
    changes: Mapping[str, Change]
    config: Mapping[str, Any] | None
    config_edits: tuple[str, ...]
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
        names = set(self.changes)
        return tuple(s.name for s in self.base.shards if any(t.name in names for t in s.tensors))


def make_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    combine: Combine = "product",
    weights: Sequence[float] = (),
    cast: Cast = "peft",
    dtype: Dtype = "auto",
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> Plan:
    """Decide what a merge of `adapters` (in order) into `base` changes.

    Refusals are collected in ``Plan.problems``. Raises `UsageError` for weights that do not fit `combine`.
    """
    _check_weights(adapters, combine, weights)
    resolutions = [resolve(a, base, allow_missing=allow_missing, allow_unused=allow_unused) for a in adapters]
    problems = [*_quantized(base), *(p for r in resolutions for p in r.problems)]
    problems += [p for adapter in adapters for p in _not_finite(adapter)]
    warnings = [w for r in resolutions for w in r.warnings]
    changes: dict[str, Change] = {}
    if not problems:
        try:
            _replace_tensors(resolutions, base, changes, dtype)
            _fold_vectors(resolutions, base, changes, combine, weights, cast, dtype)
            _write_ties(resolutions, base, changes, dtype, warnings)
            _cast_rest(base, changes, dtype)
        except IA3ExportError as error:
            problems.append(error)
    config, edits = edit_config(resolutions, base, dtype, warnings)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes |= {name: change.shape for name, change in changes.items()}
    problems += check_vocabulary(resolutions, shapes, config)
    classes = [r.runtime.class_name for r in resolutions if r.runtime is not None]
    return Plan(
        base, tuple(adapters), combine, tuple(weights), cast, dtype, allow_missing, allow_unused, changes, config, tuple(edits),
        classes[0] if classes else None, tuple(dict.fromkeys(warnings)), tuple(problems),
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


def _quantized(base: Checkpoint) -> list[IA3ExportError]:
    config = base.config or {}
    settings = [c.get("quantization_config") for c in (config, *config.values()) if isinstance(c, dict)]
    method = next((s.get("quant_method", "?") for s in settings if isinstance(s, dict)), None)
    packed = next((name for name in base.tensors if name.endswith(_QUANTIZED_SUFFIXES)), None)
    if method is None and packed is None:
        return []
    evidence = f"quantization method {method}" if method is not None else f"it holds {packed}"
    return [
        Unsupported(
            f"the base {base.location.given} is quantized ({evidence}); this version folds unquantized bases only",
            hint="give the unquantized checkpoint that the adapter's base_model_name_or_path names",
        )
    ]


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
            kept = stored.dtype if stored is not None else base.main_dtype
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
        stored = weight.dtype if weight is not None else base.main_dtype
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
                factors = _factors(vector, base.tensors[stored].dtype, cast)
                laid = make_scale(factors, part.shape, site.direction, part.layout)
                _spread(result, part.tensor, _expand(laid, part.shape), base, changes, dtype, note)
            else:
                source = changes[part.tensor].source if part.tensor in changes else base.tensors[part.source]
                factors = _factors(vector, base.tensors[part.source].dtype, cast)
                scale = make_scale(factors, part.shape, site.direction, part.layout)
                how: How = "fold" if part.tensor in base.tensors else "untie"
                _append(
                    changes, part.tensor, how, base.tensors[part.source].dtype, source, scale, note, dtype
                )
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
            multiplier = _factors(multiplier.reshape(-1), base.tensors[stored].dtype, cast)
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
            _append(changes, stored, "fold", tensor.dtype, source, Scale(factors, 1), note, dtype)


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
                name, "untie", written_dtype(tensor.dtype, dtype), tensor, (), (f"copy of {stored}",)
            )


def _cast_rest(base: Checkpoint, changes: dict[str, Change], dtype: Dtype) -> None:
    for name, tensor in base.tensors.items():
        written = written_dtype(tensor.dtype, dtype)
        if name not in changes and written != tensor.dtype:
            changes[name] = Change(name, "cast", written, tensor, (), ())
