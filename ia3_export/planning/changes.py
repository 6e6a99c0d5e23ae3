"""The tensors of a merge that are not byte for byte the base's: what replaces, folds, unties and casts
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ia3_export.adapters.combine import combine_vectors
from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor, count_elements, read_bytes, same_bytes, tensor_bytes
from ia3_export.errors import Refused, Unsupported, UsageError
from ia3_export.fold import FLOAT_DTYPES, Array, Direction, Scale, make_scale, round_vector, storage_dtype
from ia3_export.ordering import natural
from ia3_export.planning.config_edits import can_untie
from ia3_export.planning.placement import Placement, Resolution
from ia3_export.quantization.detection import Quantization
from ia3_export.words import STORED_NAMES, Cast, Combine, Dtype

How = Literal["fold", "replace", "add", "untie", "cast", "dequantize", "rewrite"]


@dataclass(frozen=True, slots=True)
class Taken:
    """Where the bytes of a tensor come from that is not the base's own: `what` the `adapter` brings, or
    without one a copy of the base's tensor `what`."""

    adapter: str | None
    what: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Change:
    """One tensor of the output that is not byte for byte the base's.

    `source` holds the bytes to start from (the base's or the adapter's, `taken` says whence), `scales` are
    folded into them in order, and `folds` are the vectors in these.
    """

    name: str
    how: How
    dtype: str
    source: StoredTensor
    scales: tuple[Scale, ...] = ()
    folds: tuple[Fold, ...] = ()
    taken: Taken | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the output."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return tensor_bytes(self.dtype, self.shape)

    def with_folds(self, scales: Sequence[Scale], folds: Sequence[Fold]) -> Change:
        """The change with further vectors, folded in after its own."""
        return replace(self, scales=(*self.scales, *scales), folds=(*self.folds, *folds))


@dataclass(frozen=True, slots=True, eq=False)
class Ledger:
    """The changes decided so far, by name, for a `dense` base under the ``--dtype`` and ``--cast`` of a
    recipe."""

    dense: Checkpoint
    dtype: Dtype
    cast: Cast
    changes: dict[str, Change] = field(default_factory=dict)

    def take(self, name: str, how: How, tensor: StoredTensor, compute_dtype: str, taken: Taken) -> None:
        """`tensor` in the place of `name`, as a tensor of `compute_dtype` is written."""
        dtype = written_dtype(compute_dtype, self.dtype)
        self.changes[name] = Change(name=name, how=how, dtype=dtype, source=tensor, taken=taken)

    def fold(self, name: str, source: StoredTensor, scale: Scale, fold: Fold, compute_dtype: str) -> None:
        """Fold `scale` into what becomes of `name`, or else into `source`, as a tensor of
        `compute_dtype` is written. A name that the base does not have leaves a tie."""
        before = self.changes.get(name)
        if before is None:
            how: How = "fold" if name in self.dense.tensors else "untie"
            before = Change(name=name, how=how, dtype=written_dtype(compute_dtype, self.dtype), source=source)
        self.changes[name] = before.with_folds((scale,), (fold,))

    def factors(self, vector: Array, stored: str) -> Array:
        """The vector in the precision that PEFT folds it in into a tensor stored as `stored` (see
        `Recipe.cast`)."""
        if self.cast == "peft-low-mem":
            return round_vector(vector, stored)
        with np.errstate(over="ignore", under="ignore"):
            return vector.astype("<f8" if stored == "F64" else "<f4")


def written_dtype(stored: str, dtype: Dtype) -> str:
    """The dtype in which a tensor stored as `stored` is written under the ``--dtype`` policy."""
    return stored if dtype == "auto" or stored not in FLOAT_DTYPES else STORED_NAMES[dtype]


def replace_tensors(resolutions: Sequence[Resolution], ledger: Ledger) -> None:
    """Heads, embeddings and other tensors that the adapters bring, in the dtype of what they replace."""
    owners: dict[str, Resolution] = {}
    base, changes = ledger.dense, ledger.changes
    for result in resolutions:
        for name, target in result.extras.items():
            tensor = result.adapter.extras[name]
            if target in owners and not same_bytes(changes[target].source, tensor):
                raise Refused(
                    f"{owners[target].adapter.name} and {result.adapter.name} both bring "
                    f"{target}, and they differ",
                    hint="merge the adapters one at a time, or drop the head from one of them",
                )
            stored = base.tensors.get(target)
            dtype = stored.compute_dtype if stored is not None else base.main_dtype
            if tensor.dtype not in FLOAT_DTYPES or dtype not in FLOAT_DTYPES:
                dtype = tensor.dtype
            owners[target] = result
            how: How = "replace" if stored is not None else "add"
            ledger.take(target, how, tensor, dtype, Taken(result.adapter.name, name))
        for name, tensor, why in (*_stored_twice(result), *_resized(result, base)):
            if name not in changes:
                ledger.take(
                    name, "replace", tensor, base.tensors[name].compute_dtype, Taken(result.adapter.name, why)
                )


def _stored_twice(result: Resolution) -> Iterator[tuple[str, StoredTensor, str]]:
    """Further stored names of tied entries to which the adapter brings one tensor for all."""
    runtime = result.runtime
    if runtime is not None:
        for source, tensor in result.shared.items():
            for entry in (source, *(entry for entry, shared in runtime.ties.items() if shared == source)):
                if entry in runtime.stored and entry not in result.adapter.extras:
                    yield runtime.stored[entry], tensor, "shared with what the adapter brings"


def _resized(result: Resolution, dense: Checkpoint) -> Iterator[tuple[str, StoredTensor, str]]:
    """Biases of the vocabulary that grow or shrink with it and that PEFT does not save: one that left its tie
    to what the adapter brings and is used no more, and constant ones (BART's ``final_logits_bias``), where
    transformers appends zeros."""
    runtime = result.runtime
    if runtime is None:
        return
    for entry, name in runtime.stored.items():
        tensor, shape = dense.tensors[name], runtime.shapes[entry]
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
        elif entry not in runtime.parameters and tensor.shape[:-1] == shape[:-1]:
            values = np.zeros(count_elements(shape), storage_dtype(tensor.dtype))
            common = min(values.size, tensor.size)
            values[:common] = np.frombuffer(read_bytes(tensor), values.dtype)[:common]
            data = values.view("u1")
            resized = StoredTensor(
                name=name,
                dtype=tensor.dtype,
                shape=shape,
                file=tensor.file,
                offset=0,
                nbytes=data.nbytes,
                data=data,
            )
            yield name, resized, "resized with the vocabulary"


def fold_vectors(
    resolutions: Sequence[Resolution], ledger: Ledger, combine: Combine, weights: Sequence[float]
) -> None:
    """The vectors of every adapter, one after the other (``product``) or combined, over the tensors they
    multiply."""
    shared = _shared(resolutions)
    if combine == "product":
        for result in resolutions:
            vectors = {key: p.site.vector for key, p in result.placements.items()}
            _lay(_VectorSet(result, result.adapter.name, vectors, result.placements), shared, ledger)
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
        weight = ledger.dense.tensors.get(placement.parts[0].source)
        stored = weight.compute_dtype if weight is not None else ledger.dense.main_dtype
        if weight is not None and weight.computed is not None:
            stored = "F32"  # PEFT rounds vectors to the dtype of 16-bit weights, and codes have none
        parts = [r.placements[key].site.vector if key in r.placements else None for r in resolutions]
        vectors[key] = combine_vectors(parts, weights, combine, stored)
    label = " + ".join(f"{w:g} {r.adapter.name}" for w, r in zip(weights, resolutions, strict=True))
    _lay(_VectorSet(resolutions[0], label, vectors, union), shared, ledger)


def _shared(resolutions: Sequence[Resolution]) -> dict[str, StoredTensor]:
    """What the adapters bring for all entries of a tie, by its source."""
    return {source: tensor for result in resolutions for source, tensor in result.shared.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _VectorSet:
    """One adapter, or one combination of several called `label`: vectors and placements by the same keys."""

    result: Resolution
    label: str
    vectors: Mapping[str, Array]
    placements: Mapping[str, Placement]


def _lay(group: _VectorSet, shared: Mapping[str, StoredTensor], ledger: Ledger) -> None:
    """Fold one adapter (or one combination) into the tensors that its modules are made of."""
    experts: dict[str, tuple[Array, Direction]] = {}
    runtime, tensors = group.result.runtime, ledger.dense.tensors
    for key, placement in group.placements.items():
        site, vector = placement.site, group.vectors[key]
        fold = Fold(group.label, site.module, site.direction)
        for part in placement.parts:
            if part.kind == "expert":
                experts[site.module] = (vector, site.direction)
            elif part.kind == "converted":
                stored = runtime.converted[part.tensor][0] if runtime else part.tensor
                factors = ledger.factors(vector, tensors[stored].compute_dtype)
                laid = make_scale(factors, part.shape, site.direction, part.layout)
                _spread(group.result, part.tensor, _expand(laid, part.shape), fold, ledger)
            else:
                source, dtype = tensors[part.source], tensors[part.source].compute_dtype
                if part.tensor in ledger.changes:
                    source = ledger.changes[part.tensor].source
                elif runtime is not None:  # a name that leaves its tie has none of its own yet
                    source = shared.get(runtime.ties.get(part.tensor, part.tensor), source)
                scale = make_scale(ledger.factors(vector, dtype), part.shape, site.direction, part.layout)
                ledger.fold(part.tensor, source, scale, fold, dtype)
    if experts:
        _lay_experts(group, experts, ledger)


def _lay_experts(group: _VectorSet, experts: Mapping[str, tuple[Array, Direction]], ledger: Ledger) -> None:
    """The vectors of single experts (by module), over the parameters in which transformers fuses them."""
    from ia3_export.models.conversions import fused_multipliers

    runtime = group.result.runtime
    if runtime is None:
        return
    left = set(experts)
    for entry, multiplier, modules in fused_multipliers(runtime.loading, experts):
        left -= set(modules)
        stored = (runtime.converted.get(entry) or (runtime.stored[entry],))[0]
        factors = ledger.factors(multiplier.reshape(-1), ledger.dense.tensors[stored].compute_dtype)
        factors = factors.reshape(runtime.shapes[entry])
        _spread(group.result, entry, factors, Fold(group.label, entry, None), ledger)
    if left:
        raise Unsupported(
            f"{min(left, key=natural)} is part of a fused expert parameter whose packing is not understood",
            hint="save the base with its experts apart (transformers 4 layout), and merge into that",
        )


def _spread(result: Resolution, entry: str, multiplier: Array, fold: Fold, ledger: Ledger) -> None:
    """A multiplier of the parameter `entry` over the stored tensors that it is made of, where it is not
    one."""
    from ia3_export.models.conversions import spread

    runtime, tensors = result.runtime, ledger.dense.tensors
    assert runtime is not None
    if entry in runtime.stored:
        parts = {runtime.stored[entry]: multiplier.reshape(-1)}
    else:
        parts = spread(runtime.loading, entry, runtime.converted[entry], multiplier, tensors)
    for stored, factors in parts.items():
        if (factors != 1).any():
            tensor = tensors[stored]
            ledger.fold(stored, tensor, _as_vector(factors, tensor.shape), fold, tensor.compute_dtype)


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


def write_ties(resolutions: Sequence[Resolution], ledger: Ledger) -> list[str]:
    """Where a tensor leaves a tie, every other name of the tie that the file lacks is written, since without
    the tie transformers would look for it: with what the adapters bring for it, or what its tied partner
    becomes, else the base's own bytes. Returns what users should know."""
    shared, warnings = _shared(resolutions), []
    base, changes = ledger.dense, ledger.changes
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
            tensor = base.tensors[stored]
            ledger.take(name, "untie", shared.get(source, tensor), tensor.compute_dtype, Taken(None, stored))
    return warnings


def cast_rest(ledger: Ledger) -> None:
    """What no vector touches and is written in another dtype than it is stored in, dequantized weights among
    it."""
    for name, tensor in ledger.dense.tensors.items():
        written = written_dtype(tensor.compute_dtype, ledger.dtype)
        if name not in ledger.changes and (written != tensor.dtype or tensor.computed is not None):
            how: How = "cast" if tensor.computed is None else "dequantize"
            ledger.changes[name] = Change(name=name, how=how, dtype=written, source=tensor)


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
