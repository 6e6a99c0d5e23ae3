"""Where the vectors on quantized weights lie: over rows and columns that have scales, or moved in front.

A vector on the output of a weight multiplies the scales of its rows. One on the input has no scale of its own
in most formats, but the projection that feeds the weight can take it on its rows where the feed-forward
allows that. No code is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ia3_export.adapters.model import Fold
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import Array, Layout, Scale, make_scale
from ia3_export.planning.changes import Change, How
from ia3_export.quantization.activations import cache_scales, grow, input_scales, largest_factor, off_center
from ia3_export.quantization.base import Base
from ia3_export.quantization.feed_forward import Feeder, activation_of, find_feeder, move_vector
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
from ia3_export.quantization.rounding import written_scale

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


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """Factors over the rows (or columns) of one weight, the vectors that they come from, the dtypes in which
    the scales are then written, and the largest relative error of these."""

    factors: Array
    folds: tuple[Fold, ...]
    dtypes: tuple[str, ...] = ()
    error: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Where vectors lie: over the rows and the columns of quantized weights, and in other tensors, all by
    name."""

    rows: dict[str, Laid] = field(default_factory=dict)
    columns: dict[str, Laid] = field(default_factory=dict)
    others: dict[str, Change] = field(default_factory=dict)

    def update(self, later: Placed) -> None:
        """Put `later` in the place of what it was made from."""
        self.rows.update(later.rows)
        self.columns.update(later.columns)
        self.others.update(later.others)


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """The base with the (out, in) `shapes` of its dense parameters and the scales of its cache (by the module
    that they were calibrated on), and where the vectors `placed` so far lie."""

    base: Base
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    cache_scales: Mapping[str, str]
    placed: Placed


def make_context(base: Base) -> Context:
    """The context of `base` before any vector is placed."""
    conv1d = any(packed.conv1d for packed in base.quantization.packed.values())
    layout: Layout = "conv1d" if conv1d else "linear"
    shapes = stored_shapes(base.dense.tensors, conv1d=conv1d)
    return Context(base, layout, shapes, cache_scales(base.stored), Placed())


def stored_shapes(tensors: Mapping[str, StoredTensor], *, conv1d: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every one of `tensors`, (out, in) for projections that are stored as Conv1D, too."""
    return {
        name: tensor.shape[::-1] if conv1d and len(tensor.shape) == 2 else tensor.shape
        for name, tensor in tensors.items()
    }


def place(weight: WeightFolds, context: Context) -> tuple[WeightOutcome, Placed]:
    """Lay the vectors over the scales that take them. Raises `CannotKeep` unless all of them have a place."""
    packed = weight.packed
    if weight.refused is not None:
        raise CannotKeep(weight.refused)
    out, columns = split_vectors(packed.shape, weight.scales, conv1d=packed.conv1d)
    placed, tensors, error = Placed(), [], 0.0
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
    side: Side, packed: Packed, vector: Array, folds: tuple[Fold, ...], laid: Mapping[str, Laid]
) -> Laid:
    """The factors on one `side` of `packed`, of which some are `laid`, with `vector` among them. Raises
    `CannotKeep`."""
    if isinstance(side, NoScale):
        raise CannotKeep(side.reason)
    before = laid.get(packed.name, Laid(np.ones(len(vector)), ()))
    factors = before.factors * vector
    both = tuple(dict.fromkeys((*before.folds, *folds)))
    if isinstance(side, BlockScales):
        return Laid(factors, both, (), side.rounding(single_precision(factors)))
    written = [written_scale(scale, single_precision(factors), packed) for scale in side.tensors]
    return Laid(
        factors, both, tuple(dtype for dtype, _ in written), max((error for _, error in written), default=0.0)
    )


def _taking(side: Side, packed: Packed) -> list[str]:
    """The stored tensors that take the vectors on one `side`."""
    return [scale.stored.name for scale in side.tensors] if isinstance(side, Scales) else [packed.name]


def _move(weight: WeightFolds, vector: Array, context: Context, placed: Placed) -> tuple[list[str], float]:
    """Lay an input vector over the rows of the projection that feeds the weight, over its bias and over the
    static scales of what then is larger: into `placed`. Returns the tensors that take it, and their largest
    relative error. Raises `CannotKeep`."""
    packed, base, shapes = weight.packed, context.base, context.shapes
    feeder, whole = feeder_rows(packed.module, vector, base.stored.config, shapes)
    name = f"{feeder}.weight"
    others: list[tuple[str, Scale]] = []
    tensors, error = [], 0.0
    into = base.quantization.packed.get(name)
    if into is None:
        tensor = base.dense.tensors[name]
        others.append((name, make_scale(single_precision(whole), tensor.shape, "out", context.layout)))
        error = ROUNDING.get(tensor.dtype, 0.0)
    else:
        with _because(f"{feeder}, which feeds it, cannot take the vector: "):
            laid = _lay(into.on_output, into, whole, weight.folds, context.placed.rows)
        placed.rows[name] = laid
        tensors, error = _taking(into.on_output, into), laid.error
    turned = off_center(packed.module, packed.parts, vector)
    if turned:
        raise CannotKeep(f"the vector cannot move: {turned}")
    if f"{feeder}.bias" in shapes:
        others.append((f"{feeder}.bias", Scale(single_precision(whole), 1)))
    factor = largest_factor(vector)
    static = [name for name, fed in context.cache_scales.items() if fed == feeder]
    others += [(name, uniform(grow(name, factor))) for name in (*static, *input_scales(packed))]
    for name, scale in others:
        tensor = base.stored.tensors.get(name) or base.dense.tensors[name]
        before = (
            placed.others.get(name) or context.placed.others.get(name) or start_change(tensor, tensor.dtype)
        )
        placed.others[name] = replace(before, how="fold").with_folds((scale,), weight.folds)
    return [*tensors, *(name for name, _ in others)], error


def feeder_rows(
    module: str, vector: Array, config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, Array]:
    """The projection that can take the input `vector` (n,) of `module`, and the factors of all its rows,
    float64, 1 where it has other rows. Arguments as of `find_feeder`. Raises `CannotKeep`."""
    with _because("the vector cannot move: "):
        feeder = find_feeder(module, len(vector), config, shapes)
        factors = move_vector(feeder, vector)
    _check_arithmetic(feeder, vector, activation_of(module, config))
    whole = np.ones(shapes[f"{feeder.module}.weight"][0])
    whole[feeder.start : feeder.stop] = factors
    return feeder.module, whole


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


def single_precision(factors: Array) -> Array:
    """`factors` as float32, infinite or zero where they leave its range."""
    with np.errstate(over="ignore", under="ignore"):
        return factors.astype("<f4")


def start_change(
    source: StoredTensor, dtype: str, scales: Sequence[Scale] = (), folds: Sequence[Fold] = ()
) -> Change:
    """A change of a stored tensor in its own place: ``rewrite`` while nothing is folded into it."""
    how: How = "fold" if folds else "rewrite"
    return Change(
        name=source.name, how=how, dtype=dtype, source=source, scales=tuple(scales), folds=tuple(folds)
    )
