"""The tensors of a merge that are not byte for byte the base's: what replaces, folds, unties and casts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ia3_export.adapters.combine import Combine, combine_vectors
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor, count_elements, read_bytes, same_bytes, tensor_bytes
from ia3_export.errors import Refused, Unsupported, UsageError
from ia3_export.fold import FLOAT_DTYPES, Array, Scale, make_scale, round_vector, storage_dtype
from ia3_export.ordering import natural
from ia3_export.planning.config_edits import can_untie
from ia3_export.planning.placement import Placement, Resolution
from ia3_export.quantization.detection import Quantization

Cast = Literal["peft", "peft-low-mem"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
How = Literal["fold", "replace", "add", "untie", "cast", "dequantize", "rewrite"]

#: Stored dtypes by the names of ``--dtype``.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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

    def with_folds(self, scales: Sequence[Scale], folds: Sequence[str]) -> Change:
        """The change with further vectors, folded in after its own."""
        return replace(self, scales=(*self.scales, *scales), folds=(*self.folds, *folds))


def written_dtype(stored: str, dtype: Dtype) -> str:
    """The dtype in which a tensor stored as `stored` is written under the ``--dtype`` policy."""
    return stored if dtype == "auto" or stored not in FLOAT_DTYPES else DTYPES[dtype]


def replace_tensors(
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
        for name, tensor, note in (*_stored_twice(result), *_resized(result, base)):
            kept = written_dtype(base.tensors[name].kept, dtype)
            changes.setdefault(
                name, Change(name, "replace", kept, tensor, (), (f"{result.adapter.name}: {note}",))
            )


def _stored_twice(result: Resolution) -> Iterator[tuple[str, StoredTensor, str]]:
    """Further stored names of tied entries to which the adapter brings one tensor for all."""
    runtime = result.runtime
    if runtime is not None:
        for source, tensor in result.shared.items():
            for entry in (source, *(entry for entry, shared in runtime.ties.items() if shared == source)):
                if entry in runtime.stored and entry not in result.adapter.extras:
                    yield runtime.stored[entry], tensor, "shared with what the adapter brings"


def _resized(result: Resolution, base: Checkpoint) -> Iterator[tuple[str, StoredTensor, str]]:
    """Biases of the vocabulary that grow or shrink with it and that PEFT does not save: one that left its tie to what the adapter
    brings and is used no more, and constant ones (BART's ``final_logits_bias``), where transformers appends zeros."""
    runtime = result.runtime
    if runtime is None:
        return
    trained = {name for name, _ in runtime.rules.model.named_parameters(remove_duplicate=False)}
    for entry, name in runtime.stored.items():
        tensor, shape = base.tensors[name], runtime.shapes[entry]
        if (
            tensor.shape == shape
            or entry in result.adapter.extras
            or max(shape, default=0) != count_elements(shape)
        ):
            continue
        partners = [target for target, source in runtime.ties.items() if source == entry]
        brought = [result.adapter.extras[partner] for partner in partners if partner in result.adapter.extras]
        if brought:
            yield name, brought[0], "resized with the vocabulary"
        elif entry not in trained and tensor.shape[:-1] == shape[:-1]:
            values = np.zeros(count_elements(shape), storage_dtype(tensor.dtype))
            kept = min(values.size, tensor.size)
            values[:kept] = np.frombuffer(read_bytes(tensor), values.dtype)[:kept]
            data = values.view("u1")
            yield (
                name, StoredTensor(name, tensor.dtype, shape, tensor.file, 0, data.nbytes, data), "resized with the vocabulary",
            )  # fmt: skip


def fold_vectors(
    resolutions: Sequence[Resolution],
    base: Checkpoint,
    changes: dict[str, Change],
    combine: Combine,
    weights: Sequence[float],
    cast: Cast,
    dtype: Dtype,
) -> None:
    """The vectors of every adapter, one after the other (``product``) or combined, over the tensors they multiply."""
    shared = _shared(resolutions)
    if combine == "product":
        for result in resolutions:
            vectors = {key: p.site.vector for key, p in result.placements.items()}
            _lay(result, vectors, result.placements, base, changes, shared, cast, dtype, result.adapter.name)
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
        if weight is not None and weight.computed is not None:
            stored = "F32"  # PEFT rounds vectors to the dtype of 16-bit weights, and codes have none
        parts = [r.placements[key].site.vector if key in r.placements else None for r in resolutions]
        vectors[key] = combine_vectors(parts, weights, combine, stored)
    label = " + ".join(f"{w:g} {r.adapter.name}" for w, r in zip(weights, resolutions, strict=True))
    _lay(resolutions[0], vectors, union, base, changes, shared, cast, dtype, label)


def _shared(resolutions: Sequence[Resolution]) -> dict[str, StoredTensor]:
    """What the adapters bring for all entries of a tie, by its source."""
    return {source: tensor for result in resolutions for source, tensor in result.shared.items()}


def _lay(
    result: Resolution,
    vectors: Mapping[str, Array],
    placements: Mapping[str, Placement],
    base: Checkpoint,
    changes: dict[str, Change],
    shared: Mapping[str, StoredTensor],
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
                source = base.tensors[part.source]
                if part.tensor in changes:
                    source = changes[part.tensor].source
                elif result.runtime is not None:  # a name that leaves its tie has none of its own yet
                    source = shared.get(result.runtime.ties.get(part.tensor, part.tensor), source)
                factors = _factors(vector, base.tensors[part.source].kept, cast)
                scale = make_scale(factors, part.shape, site.direction, part.layout)
                how: How = "fold" if part.tensor in base.tensors else "untie"
                _append(changes, part.tensor, how, base.tensors[part.source].kept, source, scale, note, dtype)
    if experts and result.runtime is not None:
        from ia3_export.models.conversions import fused_multipliers

        left = set(experts)
        for entry, multiplier, modules in fused_multipliers(result.runtime.rules, experts):
            left -= set(modules)
            stored = (result.runtime.converted.get(entry) or (result.runtime.stored[entry],))[0]
            multiplier = _factors(multiplier.reshape(-1), base.tensors[stored].kept, cast)
            multiplier = multiplier.reshape(result.runtime.shapes[entry])
            _spread(result, entry, multiplier, base, changes, dtype, f"{label}: experts of {entry}")
        if left:
            raise Unsupported(
                f"{min(left, key=natural)} is part of a fused expert parameter whose packing is not understood",
                hint="save the base with its experts apart (transformers 4 layout), and merge into that",
            )


def _spread(
    result: Resolution,
    entry: str,
    multiplier: Array,
    base: Checkpoint,
    changes: dict[str, Change],
    dtype: Dtype,
    note: str,
) -> None:
    from ia3_export.models.conversions import spread

    runtime = result.runtime
    assert runtime is not None
    if entry in runtime.stored:
        parts = {runtime.stored[entry]: multiplier.reshape(-1)}
    else:
        sources = runtime.converted[entry]
        parts = spread(runtime.rules, entry, sources, multiplier, base.tensors)
    for stored, factors in parts.items():
        if (factors != 1).any():
            tensor = base.tensors[stored]
            source = changes[stored].source if stored in changes else tensor
            scale = _as_vector(factors, tensor.shape)
            _append(changes, stored, "fold", tensor.kept, source, scale, note, dtype)


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
        changes[name] = before.with_folds((scale,), (note,))


def _factors(vector: Array, stored: str, cast: Cast) -> Array:
    """The vector in the precision that PEFT folds it in (see `Plan.cast`)."""
    if cast == "peft-low-mem":
        return round_vector(vector, stored)
    with np.errstate(over="ignore", under="ignore"):
        return vector.astype("<f8" if stored == "F64" else "<f4")


def _as_vector(factors: Array, shape: tuple[int, ...]) -> Scale:
    """A factor for every element of a tensor of `shape`, as one for every row or column where it is such."""
    if len(shape) > 1:
        grid = factors.reshape(-1, shape[-1])
        if (grid == grid[:, :1]).all():
            return Scale(grid[:, 0].copy(), shape[-1])
        if (grid == grid[:1]).all():
            return Scale(grid[0].copy(), 1)
    return Scale(factors, 1)


def _expand(scale: Scale, shape: tuple[int, ...]) -> Array:
    element = np.arange(count_elements(shape))
    return scale.factors[element // scale.inner % len(scale.factors)].reshape(shape)


def write_ties(
    resolutions: Sequence[Resolution],
    base: Checkpoint,
    changes: dict[str, Change],
    dtype: Dtype,
    warnings: list[str],
) -> None:
    """Where a tensor leaves a tie, every other name of the tie that the file lacks is written, since without the tie
    transformers would look for it: with what the adapters bring for it, or what its tied partner becomes, else the base's
    own bytes."""
    shared = _shared(resolutions)
    for result in resolutions:
        if not result.untied or result.runtime is None:
            continue
        runtime = result.runtime
        apart = can_untie(result, base)
        warnings.append(f"untied: {', '.join(dict.fromkeys(result.untied))} no longer shares its tensor")
        for target, source in runtime.ties.items():
            name = runtime.stored.get(target, target)
            stored = runtime.stored.get(source)
            if target in runtime.stored or name in changes or stored is None:
                continue
            if not apart and source not in result.untied:
                continue  # it stays tied to what its partner becomes
            tensor = shared.get(source, base.tensors[stored])
            changes[name] = Change(
                name,
                "untie",
                written_dtype(base.tensors[stored].kept, dtype),
                tensor,
                (),
                (f"copy of {stored}",),
            )


def cast_rest(base: Checkpoint, changes: dict[str, Change], dtype: Dtype) -> None:
    """What no vector touches and is written in another dtype than it is stored in, dequantized weights among it."""
    for name, tensor in base.tensors.items():
        written = written_dtype(tensor.kept, dtype)
        if name not in changes and (written != tensor.dtype or tensor.computed is not None):
            how: How = "cast" if tensor.computed is None else "dequantize"
            changes[name] = Change(name, how, written, tensor, (), ())


def check_gguf(
    quantization: Quantization, changes: Mapping[str, Change], dtype: str, shard_size: int | None = None
) -> None:
    """Raise `UsageError` or `Refused` for what a GGUF output cannot hold."""
    if dtype != "auto" or shard_size is not None:
        option = "--shard-size" if dtype == "auto" else f"--dtype {dtype}"
        raise UsageError(
            f"{option} does not apply to a GGUF base",
            hint="the output is the same file with the vectors folded in",
        )
    heads = quantization.settings.get("head_rows") or {}
    for change in changes.values():
        if change.how in ("replace", "add", "untie"):
            raise Refused(
                f"the adapter brings {change.name}, and llama.cpp's form of whole tensors is not written",
                hint="merge into the Hugging Face checkpoint and convert that to GGUF",
            )
        if change.name in heads and (change.scales or change.how == "dequantize"):
            raise Refused(
                f"{change.name} has permuted rows and would have to be written dense",
                hint="merge into the Hugging Face checkpoint and convert that to GGUF",
            )
