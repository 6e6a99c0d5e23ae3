"""``--quantized keep``: the vectors of a dense plan, folded into the stored scales of a quantized base
instead.

Starts from the changes that a merge into the dequantized base would make. A vector on the output of a weight
multiplies the scales of its rows. One on the input has no scale of its own in most formats, but the
projection that feeds the weight can take it on its rows where the feed-forward allows that. No code is
touched; what cannot be kept is written dense or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Array, Layout, Scale, make_scale
from ia3_export.planning.changes import Change, How
from ia3_export.quantization.activations import cache_scales, grow, input_scales, largest_factor, off_center
from ia3_export.quantization.base import Base
from ia3_export.quantization.detection import Quantization
from ia3_export.quantization.feed_forward import (
    Feeder,
    activation_of,
    find_feeder,
    move_vector,
)
from ia3_export.quantization.feed_forward_check import self_check
from ia3_export.quantization.packed import (
    ROUNDING,
    BlockScales,
    CannotKeep,
    NoScale,
    Packed,
    Scales,
    Side,
    split_vectors,
)
from ia3_export.quantization.rounding import laid_over, written_scale

OutcomeKind = Literal["exact", "rounded", "moved", "dense", "refused"]

#: Relative error of one rounding to float32; a scale that has no more counts as exact.
_EXACT = 2.0**-23
#: The moved vector has to give the live one's result up to the rounding of float32 factors, on so many
#: channels.
_SELF_CHECK, _CHECKED = 1e-5, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOutcome:
    """What becomes of the vectors on one quantized weight.

    ``exact``: its scales take them, with one float32 rounding at most; ``rounded``: each scale with the
    relative error `error`; ``moved``: `tensors` of the projection that feeds it take them, with that error;
    ``dense`` and ``refused``: `reason` says why. `folds` names the vectors.
    """

    weight: str
    format: str
    kind: OutcomeKind
    tensors: tuple[str, ...] = ()
    error: float = 0.0
    reason: str = ""
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightFolds:
    """The vectors that a dense plan folds into one quantized weight; `refused` is a reason why it cannot stay
    quantized with any."""

    packed: Packed
    scales: tuple[Scale, ...]
    folds: tuple[Fold, ...]
    refused: str | None = None


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


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """Factors over the rows (or columns) of one weight, the vectors that they come from, the dtypes in which
    the scales are then written, and the largest relative error of these."""

    factors: Array
    folds: tuple[Fold, ...]
    dtypes: tuple[str, ...] = ()
    error: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """Where vectors lie: over the rows and the columns of quantized weights, and in other tensors, all by
    name."""

    rows: dict[str, _Laid] = field(default_factory=dict)
    columns: dict[str, _Laid] = field(default_factory=dict)
    others: dict[str, Change] = field(default_factory=dict)

    def update(self, later: _Placed) -> None:
        """Put `later` in the place of what it was made from."""
        self.rows.update(later.rows)
        self.columns.update(later.columns)
        self.others.update(later.others)


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    """The base with the (out, in) `shapes` of its dense parameters and the scales of its cache (by the module
    that they were calibrated on), and where the vectors `placed` so far lie."""

    base: Base
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    cache_scales: Mapping[str, str]
    placed: _Placed


def keep_codes(weights: Iterable[WeightFolds], base: Base, *, or_dense: bool) -> Kept:
    """Find the scales that take the vectors on `weights`.

    Reads scales that are stored in 16 bits, to say how much they are rounded. With `or_dense` a weight that
    cannot be kept becomes dense, else it is listed as refused.
    """
    context = _make_context(base)
    kept = Kept()
    for weight in weights:
        try:
            outcome, placed = _place(weight, context)
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


def _make_context(base: Base) -> _Context:
    conv1d = any(packed.conv1d for packed in base.quantization.packed.values())
    layout: Layout = "conv1d" if conv1d else "linear"
    shapes = {
        name: tensor.shape[::-1] if conv1d and len(tensor.shape) == 2 else tensor.shape
        for name, tensor in base.dense.tensors.items()
    }
    return _Context(base, layout, shapes, cache_scales(base.stored), _Placed())


def _without_scales(weight: WeightFolds, reason: str, base: Base, kept: Kept | None) -> WeightOutcome:
    """The outcome for a weight whose scales do not take its vectors: dense in `kept`, or refused."""
    packed = weight.packed
    outcome = WeightOutcome(
        weight=packed.name, format=packed.format, kind="refused", reason=reason, folds=weight.folds
    )
    if kept is None:
        return outcome
    tensor = base.dense.tensors[packed.name]
    kept.changes[packed.name] = _change(tensor, tensor.compute_dtype, weight.scales, weight.folds)
    kept.drops |= packed.parts.keys() - {packed.name}
    kept.dense.add(packed.name)
    return replace(outcome, kind="dense", tensors=(packed.name,))


def _place(weight: WeightFolds, context: _Context) -> tuple[WeightOutcome, _Placed]:
    """Lay the vectors over the scales that take them. Raises `CannotKeep` unless all of them have a place."""
    packed = weight.packed
    if weight.refused is not None:
        raise CannotKeep(weight.refused)
    out, columns = split_vectors(packed.shape, weight.scales, conv1d=packed.conv1d)
    placed, tensors, error = _Placed(), [], 0.0
    kind: OutcomeKind = "exact"
    if out is not None:
        laid = _lay(packed.on_output, packed, out, weight.folds, context.placed.rows)
        placed.rows[packed.name] = laid
        tensors += _taking(packed.on_output, packed)
        error = laid.error
    if columns is not None and isinstance(packed.on_input, NoScale):
        with _because(f"{packed.on_input.reason}, and "):
            names, rounding = _move(weight, columns, context, placed)
        tensors += names
        error = max(error, rounding)
        kind = "moved"
    elif columns is not None:
        laid = _lay(packed.on_input, packed, columns, weight.folds, context.placed.columns)
        placed.columns[packed.name] = laid
        tensors += _taking(packed.on_input, packed)
        error = max(error, laid.error)
    if kind == "exact" and error > _EXACT:
        kind = "rounded"
    outcome = WeightOutcome(
        weight=packed.name,
        format=packed.format,
        kind=kind,
        tensors=tuple(tensors),
        error=error,
        folds=weight.folds,
    )
    return outcome, placed


@contextmanager
def _because(clause: str) -> Iterator[None]:
    """Put `clause` before the reason for which something cannot be kept."""
    try:
        yield
    except CannotKeep as why:
        raise CannotKeep(f"{clause}{why}") from why


def _lay(
    side: Side, packed: Packed, vector: Array, folds: tuple[Fold, ...], laid: Mapping[str, _Laid]
) -> _Laid:
    """The factors on one `side` of `packed`, of which some are `laid`, with `vector` among them. Raises
    `CannotKeep`."""
    if isinstance(side, NoScale):
        raise CannotKeep(side.reason)
    before = laid.get(packed.name, _Laid(np.ones(len(vector)), ()))
    factors = before.factors * vector
    both = tuple(dict.fromkeys((*before.folds, *folds)))
    if isinstance(side, BlockScales):
        return _Laid(factors, both, (), side.rounding(_single(factors)))
    written = [written_scale(scale, _single(factors), packed) for scale in side.tensors]
    return _Laid(
        factors, both, tuple(dtype for dtype, _ in written), max((error for _, error in written), default=0.0)
    )


def _taking(side: Side, packed: Packed) -> list[str]:
    """The stored tensors that take the vectors on one `side`."""
    return [scale.stored.name for scale in side.tensors] if isinstance(side, Scales) else [packed.name]


def _move(weight: WeightFolds, vector: Array, context: _Context, placed: _Placed) -> tuple[list[str], float]:
    """Lay an input vector over the rows of the projection that feeds the weight, over its bias and over the
    static scales of what then is larger: into `placed`. Returns the tensors that take it, and their largest
    relative error. Raises `CannotKeep`."""
    packed, base, shapes = weight.packed, context.base, context.shapes
    with _because("the vector cannot move: "):
        feeder = find_feeder(packed.module, len(vector), base.stored.config, shapes)
        factors = move_vector(feeder, vector)
    _check_arithmetic(feeder, vector, activation_of(packed.module, base.stored.config))
    name = f"{feeder.module}.weight"
    whole = np.ones(shapes[name][0])
    whole[feeder.start : feeder.stop] = factors
    others: list[tuple[str, Scale]] = []
    tensors, error = [], 0.0
    into = base.quantization.packed.get(name)
    if into is None:
        tensor = base.dense.tensors[name]
        others.append((name, make_scale(_single(whole), tensor.shape, "out", context.layout)))
        error = ROUNDING.get(tensor.dtype, 0.0)
    else:
        with _because(f"{feeder.module}, which feeds it, cannot take the vector: "):
            laid = _lay(into.on_output, into, whole, weight.folds, context.placed.rows)
        placed.rows[name] = laid
        tensors, error = _taking(into.on_output, into), laid.error
    turned = off_center(packed.module, packed.parts, vector)
    if turned:
        raise CannotKeep(f"the vector cannot move: {turned}")
    if f"{feeder.module}.bias" in shapes:
        others.append((f"{feeder.module}.bias", Scale(_single(whole), 1)))
    factor = largest_factor(vector)
    static = [name for name, fed in context.cache_scales.items() if fed == feeder.module]
    others += [(name, uniform(grow(name, factor))) for name in (*static, *input_scales(packed))]
    for name, scale in others:
        tensor = base.stored.tensors.get(name) or base.dense.tensors[name]
        before = placed.others.get(name) or context.placed.others.get(name) or _change(tensor, tensor.dtype)
        placed.others[name] = replace(before, how="fold").with_folds((scale,), weight.folds)
    return [*tensors, *(name for name, _ in others)], error


def _check_arithmetic(feeder: Feeder, vector: Array, activation: str | None) -> None:
    """Try some channels of a moved vector in numbers. Raises `CannotKeep`."""
    few = min(len(vector), _CHECKED)
    first = feeder.start // len(vector) * few
    sample = replace(feeder, start=first, stop=first + few)
    if not self_check(sample, vector[:few], activation) <= _SELF_CHECK:
        raise CannotKeep(f"moving the vector to {feeder.module} failed its numeric self-check")


def uniform(factor: float) -> Scale:
    """One factor for all of a tensor."""
    return Scale(np.full(1, factor, "<f4"), 1)


def _single(factors: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return factors.astype("<f4")


def _change(
    source: StoredTensor, dtype: str, scales: Sequence[Scale] = (), folds: Sequence[Fold] = ()
) -> Change:
    how: How = "fold" if folds else "rewrite"
    return Change(
        name=source.name, how=how, dtype=dtype, source=source, scales=tuple(scales), folds=tuple(folds)
    )


def _write_placed(context: _Context, kept: Kept) -> None:
    """The changes of stored tensors that everything placed makes."""
    packed, placed = context.base.quantization.packed, context.placed
    for name, laid in placed.rows.items():
        if name in kept.dense:  # a vector of its neighbour was moved onto it before
            scale = make_scale(_single(laid.factors), packed[name].shape, "out", context.layout)
            kept.changes[name] = kept.changes[name].with_folds((scale,), laid.folds)
        else:
            _emit(packed[name].on_output, laid, kept)
    for name, laid in placed.columns.items():
        _emit(packed[name].on_input, laid, kept)
    kept.changes.update(placed.others)


def _emit(side: Side, laid: _Laid, kept: Kept) -> None:
    factors = _single(laid.factors)
    if isinstance(side, BlockScales):
        tensor = side.fold(factors)
        kept.changes[tensor.name] = _change(tensor, tensor.dtype, (), laid.folds)
        return
    assert isinstance(side, Scales)
    for scale, dtype in zip(side.tensors, laid.dtypes, strict=True):
        before = kept.changes.get(scale.stored.name) or _change(scale.stored, dtype)
        folded = Scale(laid_over(scale, factors), scale.inner)
        kept.changes[scale.stored.name] = replace(before, how="fold", dtype=dtype).with_folds(
            (folded,), laid.folds
        )
    for tensor in side.rewrites:
        kept.changes[tensor.name] = _change(tensor, tensor.dtype)
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
            kept.changes.setdefault(scale.stored.name, _change(scale.stored, scale.stored.dtype))


def _sign_warnings(laid: Iterable[_Laid]) -> list[str]:
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
