"""``--quantized keep``: the vectors of a dense plan, folded into the stored scales of a quantized base instead.

Starts from the changes that a merge into the dequantized base would make. A vector on the output of a weight multiplies
the scales of its rows. One on the input has no scale of its own in most formats, but the projection that feeds the weight
can take it on its rows where the feed-forward allows that. No code is touched; what cannot be kept is written dense or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Array, Layout, Scale, from_float, make_scale, to_float
from ia3_export.planning.changes import Change, How
from ia3_export.quantization.activations import cache_scales, grow, input_scales, largest, off_center
from ia3_export.quantization.base import Base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.feed_forward import activation_of, find_feeder, move_vector, self_check
from ia3_export.quantization.packed import (
    ROUNDING,
    Foldable,
    Packed,
    ScaleTensor,
    as_float,
    read_flat,
    split_vectors,
)
from ia3_export.words import TORCH_NAMES

Outcome = Literal["exact", "rounded", "moved", "dense", "refused"]

#: Largest relative error of a scale: beyond it, it has overflowed, or is subnormal and has lost its bits.
_COARSEST = 2.0**-7
#: That of one rounding to float16 in its normal range.
_HALF = 1.001 * 2.0**-11
#: Relative error of one rounding to float32; a scale that has no more counts as exact.
_EXACT = 2.0**-23
#: The moved vector has to give the live one's result up to the rounding of float32 factors, on so many channels.
_SELF_CHECK, _CHECKED = 1e-5, 64


@dataclass(frozen=True, slots=True)
class KeptSite:
    """What becomes of the vectors on one quantized weight.

    ``exact``: its scales take them, with one float32 rounding at most; ``rounded``: each scale with the relative error
    `error`; ``moved``: `tensors` of the projection that feeds it take them, with that error; ``dense`` and ``refused``:
    `reason` says why. `folds` names the vectors.
    """

    weight: str
    format: str
    outcome: Outcome
    tensors: tuple[str, ...]
    error: float
    reason: str
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Folds:
    """The vectors that a dense plan folds into one quantized weight, and a reason why it cannot stay quantized with any."""

    packed: Packed
    scales: tuple[Scale, ...]
    notes: tuple[Fold, ...]
    refused: str = ""


@dataclass(slots=True)
class Kept:
    """What `keep_codes` decided: `changes` of stored tensors by name, stored tensors that the output `drops`, what
    became `dense`, and the `groups` of the configuration whose weights now have a scale a channel."""

    sites: list[KeptSite] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)
    drops: set[str] = field(default_factory=set)
    dense: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Laid:
    """Factors laid over the rows (or columns) of one weight so far, the vectors they come from, and the dtypes in which
    the scales are written."""

    factors: Array
    notes: tuple[Fold, ...]
    dtypes: tuple[str, ...] = ()

    def times(self, factors: Array, notes: tuple[Fold, ...]) -> _Laid:
        return _Laid(self.factors * factors, tuple(dict.fromkeys((*self.notes, *notes))))


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    base: Checkpoint
    dense: Checkpoint
    quantization: Quantization
    layout: Layout
    #: Of the dense parameters, (out, in).
    shapes: Mapping[str, tuple[int, ...]]
    cache_scales: Mapping[str, str]
    rows: dict[str, _Laid] = field(default_factory=dict)
    columns: dict[str, _Laid] = field(default_factory=dict)
    others: dict[str, list[tuple[Scale, tuple[Fold, ...]]]] = field(default_factory=dict)


def keep_codes(folds: Iterable[Folds], base: Base, *, or_dense: bool) -> Kept:
    """Find the scales that take the vectors of `folds`.

    Reads scales that are stored in 16 bits, to say how much they are rounded. With `or_dense` a weight that cannot be kept
    becomes dense, else it is listed as refused.
    """
    stored, dense, quantization = base.stored, base.dense, base.quantization
    layout: Layout = "conv1d" if any(packed.conv1d for packed in quantization.packed.values()) else "linear"
    turned = {n for n, t in dense.tensors.items() if layout == "conv1d" and len(t.shape) == 2}
    shapes = {n: t.shape[::-1] if n in turned else t.shape for n, t in dense.tensors.items()}
    context = _Context(stored, dense, quantization, layout, shapes, cache_scales(stored))
    kept = Kept()
    for fold in folds:
        site = _decide(fold, context)
        if site.outcome == "refused" and or_dense:
            site = KeptSite(site.weight, site.format, "dense", (site.weight,), 0.0, site.reason, site.folds)
            kept.dense.add(site.weight)
            _write_dense(fold, context, kept)
        kept.sites.append(site)
    for name, laid in context.rows.items():
        packed = quantization.packed[name]
        if name in kept.dense:  # a vector of its neighbour was moved onto it before
            scale = make_scale(_single(laid.factors), packed.shape, "out", layout)
            kept.changes[name] = kept.changes[name].with_folds((scale,), laid.notes)
        else:
            _emit(packed.on_output, laid, kept)
    for name, laid in context.columns.items():
        _emit(quantization.packed[name].on_input, laid, kept)
    for name, parts in context.others.items():
        tensor = stored.tensors.get(name) or dense.tensors[name]
        kept.changes[name] = _change(
            tensor,
            tensor.dtype,
            [scale for scale, _ in parts],
            [note for _, notes in parts for note in notes],
        )
    _promote_groups(quantization, kept)
    coarse = [site for site in kept.sites if site.error > 2.0**-9]
    if coarse:
        kept.warnings.append(
            f"{len(coarse)} weights have scales in bfloat16, or ones that lose precision: rounded by up to "
            f"{max(site.error for site in coarse):.1e}, which may be more than a dense weight loses"
        )
    kept.warnings += _sign_warnings([*context.rows.values(), *context.columns.values()])
    return kept


def _decide(fold: Folds, context: _Context) -> KeptSite:
    """Lay the vectors over the scales that take them, all of them or none."""
    packed = fold.packed

    def refused(reason: str) -> KeptSite:
        return KeptSite(packed.name, packed.format, "refused", (), 0.0, reason, fold.notes)

    if fold.refused:
        return refused(fold.refused)
    vectors = split_vectors(packed.shape, fold.scales, conv1d=packed.conv1d)
    if isinstance(vectors, str):
        return refused(vectors)
    out, columns = vectors
    tensors: list[str] = []
    outcome: Outcome = "exact"
    error, commits = 0.0, []
    for vector, how, laid in (
        (out, packed.on_output, context.rows),
        (columns, packed.on_input, context.columns),
    ):
        if vector is None:
            continue
        if isinstance(how, Foldable):
            found = _lay(how, packed, vector, fold.notes, laid)
            if isinstance(found, str):
                return refused(found)
            commits.append((laid, packed.name, found[0]))
            error = max(error, found[1])
            tensors += [scale.stored.name for scale in how.scales] or [packed.name]
        elif laid is context.rows:
            return refused(how)
        else:
            moved = _move(packed, vector, fold.notes, how, context)
            if isinstance(moved, str):
                return refused(moved)
            commits += moved.commits
            for name, scale in moved.others:
                context.others.setdefault(name, []).append((scale, fold.notes))
            error = max(error, moved.error)
            outcome = "moved"
            tensors += moved.tensors
    for laid, name, factors in commits:
        laid[name] = factors
    if outcome == "exact" and error > _EXACT:
        outcome = "rounded"
    return KeptSite(packed.name, packed.format, outcome, tuple(tensors), error, "", fold.notes)


def _lay(
    how: Foldable, packed: Packed, vector: Array, notes: tuple[Fold, ...], laid: Mapping[str, _Laid]
) -> tuple[_Laid, float] | str:
    """The factors on `packed` with `vector` among them, and the rounding error of its scales; or why they do not fit."""
    before = laid.get(packed.name, _Laid(np.ones(len(vector)), ()))
    after = before.times(vector, notes)
    if how.blocks is not None:
        return after, 0.0 if how.rounding is None else how.rounding(_single(after.factors))
    error = 0.0
    for scale in how.scales:
        found = _written(scale, _single(after.factors), packed)
        if isinstance(found, str):
            return found
        after.dtypes += (found[0],)
        error = max(error, found[1])
    return after, error


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """A vector on the rows of the feeder: what to lay where, and the error that rounding makes there."""

    commits: list[tuple[dict[str, _Laid], str, _Laid]]
    others: list[tuple[str, Scale]]
    error: float
    tensors: list[str]


def _move(
    packed: Packed, vector: Array, notes: tuple[Fold, ...], reason: str, context: _Context
) -> _Moved | str:
    """Lay an input vector over the rows of the projection that feeds the weight, and over its bias."""
    shapes = context.shapes
    feeder = find_feeder(packed.module, len(vector), context.base.config, shapes)
    if isinstance(feeder, str):
        return f"{reason}, and the vector cannot move: {feeder}"
    factors = move_vector(feeder, vector)
    if isinstance(factors, str):
        return f"{reason}, and the vector cannot move: {factors}"
    few = min(len(vector), _CHECKED)
    first = feeder.start // len(vector) * few
    sample = replace(feeder, start=first, stop=first + few)
    if not self_check(sample, vector[:few], activation_of(packed.module, context.base.config)) <= _SELF_CHECK:
        return f"{reason}, and moving the vector to {feeder.module} failed its numeric self-check"
    weight = f"{feeder.module}.weight"
    whole = np.ones(shapes[weight][0])
    whole[feeder.start : feeder.stop] = factors
    commits: list[tuple[dict[str, _Laid], str, _Laid]] = []
    others: list[tuple[str, Scale]] = []
    tensors: list[str] = []
    into = context.quantization.packed.get(weight)
    if into is None:
        stored = context.dense.tensors[weight]
        others.append((weight, make_scale(_single(whole), stored.shape, "out", context.layout)))
        error = ROUNDING.get(stored.dtype, 0.0)
    elif isinstance(into.on_output, str):
        return f"{reason}, and {feeder.module}, which feeds it, cannot take the vector: {into.on_output}"
    else:
        found = _lay(into.on_output, into, whole, notes, context.rows)
        if isinstance(found, str):
            return f"{reason}, and {feeder.module}, which feeds it, cannot take the vector: {found}"
        commits.append((context.rows, weight, found[0]))
        error = found[1]
        tensors += [scale.stored.name for scale in into.on_output.scales] or [weight]
    turned = off_center(packed.module, packed.parts, vector)
    if turned:
        return f"{reason}, and the vector cannot move: {turned}"
    if f"{feeder.module}.bias" in shapes:
        others.append((f"{feeder.module}.bias", Scale(_single(whole), 1)))
    factor = largest(vector)
    static = [name for name, fed in context.cache_scales.items() if fed == feeder.module]
    others += [(name, uniform(grow(name, factor))) for name in (*static, *input_scales(packed))]
    return _Moved(commits, others, error, [*tensors, *(name for name, _ in others)])


def uniform(factor: float) -> Scale:
    """One factor for all of a tensor."""
    return Scale(np.full(1, factor, "<f4"), 1)


def _single(factors: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return factors.astype("<f4")


def _written(scale: ScaleTensor, factors: Array, packed: Packed) -> tuple[str, float] | str:
    """The dtype in which a tensor of scales is written, and the largest relative error that makes.

    compressed-tensors reads scales of any floating dtype, so that one a row becomes float32, and those of groups float16 (as
    large as bfloat16, eight times as exact) where they lie in its range.
    """
    stored = scale.stored
    if scale.divides and (factors == 0).any():
        return f"{stored.name} divides, and the vector holds a zero"
    if stored.dtype == "F32":
        return "F32", 2.0**-24
    values = as_float(read_flat(stored, 0, stored.size), stored.dtype).astype("<f8")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values * np.resize(np.repeat(_for(scale, factors).astype("<f8"), scale.inner), len(values))
    choices: tuple[str, ...] = (stored.dtype,)
    if packed.method == "compressed-tensors":
        # two more bytes a row are nothing, two more a group are
        choices = ("F32",) if stored.size == packed.shape[0] else ("F16", "F32")
    nonzero = scaled != 0
    for dtype in choices:
        rounded = to_float(from_float(scaled.astype("<f4"), dtype), dtype).astype("<f8")
        error = float(np.abs(rounded[nonzero] / scaled[nonzero] - 1).max(initial=0.0))
        if error <= (_COARSEST if dtype == choices[-1] else _HALF):
            return dtype, error
    return f"a scale times the vector leaves the range of {TORCH_NAMES[stored.dtype]} (it would be off by {error:.1e})"


def _for(scale: ScaleTensor, factors: Array) -> Array:
    return np.float32(1) / factors if scale.divides else factors


def _change(
    source: StoredTensor, dtype: str, scales: Sequence[Scale] = (), notes: Sequence[Fold] = ()
) -> Change:
    how: How = "fold" if notes else "rewrite"
    return Change(
        name=source.name, how=how, dtype=dtype, source=source, scales=tuple(scales), folds=tuple(notes)
    )


def _emit(how: Foldable | str, laid: _Laid, kept: Kept) -> None:
    assert isinstance(how, Foldable)
    factors = _single(laid.factors)
    if how.blocks is not None:
        tensor = how.blocks(factors)
        kept.changes[tensor.name] = _change(tensor, tensor.dtype, (), laid.notes)
    for scale, dtype in zip(how.scales, laid.dtypes, strict=True):
        before = kept.changes.get(scale.stored.name) or _change(scale.stored, dtype)
        laid_over = Scale(_for(scale, factors), scale.inner)
        kept.changes[scale.stored.name] = replace(before, how="fold", dtype=dtype).with_folds(
            (laid_over,), laid.notes
        )
    for tensor in how.rewrites:
        kept.changes[tensor.name] = _change(tensor, tensor.dtype)
    kept.drops |= set(how.drops)
    if how.group is not None:
        kept.groups.add(how.group)


def _write_dense(fold: Folds, context: _Context, kept: Kept) -> None:
    packed = fold.packed
    tensor = context.dense.tensors[packed.name]
    kept.changes[packed.name] = _change(tensor, tensor.compute_dtype, fold.scales, fold.notes)
    kept.drops |= packed.parts.keys() - {packed.name}


def _promote_groups(quantization: Quantization, kept: Kept) -> None:
    """All weights of a group of the configuration get a scale a channel once one has."""
    for packed in quantization.packed.values():
        how = packed.on_output
        if not isinstance(how, Foldable) or how.group not in kept.groups or packed.name in kept.dense:
            continue
        for scale in how.scales:
            kept.changes.setdefault(scale.stored.name, _change(scale.stored, scale.stored.dtype))


def _sign_warnings(laid: Iterable[_Laid]) -> list[str]:
    factors = [row.factors for row in laid]
    negative = sum(int((f < 0).sum()) for f in factors)
    zero = sum(int((f == 0).sum()) for f in factors)
    if not negative and not zero:
        return []
    found = " and ".join(f"{n} {what}" for n, what in ((negative, "negative"), (zero, "zero")) if n)
    return [
        f"{found} scales are written: the libraries tried on CPUs read them rightly, kernels of GPUs were not tried"
    ]
