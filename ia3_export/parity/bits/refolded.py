"""The weights proof of a refolded graph: what was to change is the product of old values and vectors, and
every other initializer has the bytes that it had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ia3_export.fold import Array, from_float, to_float
from ia3_export.onnx.decoded import DENSE, find_coded, values_of
from ia3_export.onnx.live_graph import LiveFold
from ia3_export.onnx.places import GraphFile
from ia3_export.onnx.refold import fits, raw_blocks
from ia3_export.onnx.spans import Span
from ia3_export.report.model import TensorFinding, WeightsProof
from ia3_export.words import ONNX_FLOATS

_BLOCK = 4 << 20
#: Float32 products in another order: their last places.
_ROUNDING = 2.0**-22
_HALF = 2.0**-10


def prove_refolded(
    before: GraphFile, after: GraphFile, folds: Sequence[LiveFold], replaced: Mapping[str, Array], name: str
) -> WeightsProof:
    """Compare the initializers of the graph `after` with those of the base's, `before`: those with `folds`,
    and the `replaced` ones, which must have these values."""
    by_name: dict[str, list[LiveFold]] = {}
    for fold in folds:
        by_name.setdefault(fold.place.name, []).append(fold)
    findings: list[TensorFinding] = []
    belonging = {own: _parts(before, own) for own in by_name if own in before.coded}
    heads = {own.removesuffix(DENSE) for own in replaced}
    belonging |= {own: _parts(before, own) for own in heads if own in before.coded}
    judged = set(by_name) | set(replaced) | {part for parts in belonging.values() for part in parts}
    for own, some in by_name.items():
        wrong = _codes(before, after, own, some) if own in before.coded else _floats(before, after, own, some)
        findings += [TensorFinding(own, "differs", why) for why in wrong]
    for own, values in replaced.items():
        found = values_of(after, own) if own in after.spans else None
        if found is None or found.tobytes() != values.tobytes():
            findings.append(TensorFinding(own, "differs", "it is not the tensor that the adapter brings"))
    others = [name for name in before.spans if name not in judged]
    for other in others:
        if other in after.spans and not _same_bytes(before.spans[other], after.spans[other]):
            findings.append(TensorFinding(other, "differs", "no vector lies on it, and its bytes are others"))
        elif other not in after.spans and not any(f"{own}{DENSE}" in after.spans for own in belonging):
            findings.append(TensorFinding(other, "missing", "the base's graph has it"))
    return WeightsProof(
        name=name,
        kind="onnx",
        file=after.path.name,
        passed=not findings,
        changed=len(by_name) + len(replaced),
        unchanged=sum(other in after.spans for other in others),
        nbytes=sum(span.nbytes for span in after.spans.values()),
        findings=tuple(findings),
    )


def _parts(graph: GraphFile, own: str) -> list[str]:
    """The initializers that together are the codes of a weight."""
    ends = ("_scales", "_scale", "_offsets", "_zero_points", "_zero_point")
    names = {f"{own}{end}" for end in ends}
    return [graph.coded[own], *(name for name in graph.spans if name.rstrip("_") in names)]


def _floats(before: GraphFile, after: GraphFile, own: str, folds: Sequence[LiveFold]) -> Iterator[str]:
    """Whether a float initializer is old values times vectors, rounded after each."""
    old, new = before.spans[own], after.spans.get(own)
    if new is None or (new.dtype, new.shape) != (old.dtype, old.shape):
        yield "it has another type or shape"
        return
    dtype = ONNX_FLOATS[old.dtype]
    model = folds[0].laid.dtype
    kept = model if fits(old, model) else dtype
    factors = [_factors(fold, old.shape) for fold in folds]
    for (raw, first), (found, _) in zip(raw_blocks(old), raw_blocks(new), strict=True):
        values = to_float(raw, dtype).copy()
        index = np.arange(first, first + len(raw))
        for each, period, inner in factors:
            values *= each[index // inner % period]
            values = to_float(from_float(values, kept), kept).copy()
        if not np.array_equal(from_float(values, dtype).view("u1"), found.view("u1")):
            yield "it is not the base's tensor times the vector"
            return


def _factors(fold: LiveFold, shape: tuple[int, ...]) -> tuple[Array, int, int]:
    """Factors of a vector over an initializer of `shape`, their number, and elements that share one."""
    place, laid = fold.place, fold.laid
    factors, inner = laid.scale.factors, laid.scale.inner
    if place.transposed or place.count is not None:
        axis = 0 if len(shape) == 1 else laid.scale.axis(laid.shape) or 0
        axis = len(shape) - 1 - axis if place.transposed and len(shape) == 2 else axis
        if place.count is not None:
            factors = np.ones(shape[axis], factors.dtype)
            factors[place.first : place.first + place.count] = laid.scale.factors
        inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    return factors, len(factors), inner


def _codes(before: GraphFile, after: GraphFile, own: str, folds: Sequence[LiveFold]) -> Iterator[str]:
    """Whether codes (or the float32 weight in their place) stand for old values times vectors."""
    inputs = [len(fold.laid.scale.factors) for fold in folds if fold.laid.direction == "in"]
    columns = inputs[0] if inputs else None
    coded = find_coded(before, own, columns=columns)
    old = coded.values()
    gain = np.ones_like(old)
    for fold in folds:
        factors = fold.laid.scale.factors.astype("<f4")
        if fold.laid.direction == "in":
            along: tuple[int, ...] = (1, -1, *(1,) * (old.ndim - 2))
            gain *= factors.reshape(along)
        else:
            rows = slice(fold.place.first, fold.place.first + len(factors))
            along = (-1, *(1,) * (old.ndim - 1))
            gain[rows] *= factors.reshape(along)
    old *= gain
    dense, again = after.spans.get(f"{own}{DENSE}"), False
    if dense is not None:
        held = values_of(after, dense.name)
        found = held.T if held.ndim == 2 else held
    elif own in after.coded:
        again = not _same_bytes(before.spans[before.coded[own]], after.spans[after.coded[own]])
        if again and not inputs:
            yield "its codes are others than the base's"
            return
        found = find_coded(after, own, columns=columns).values()
    else:
        yield "the graph holds it no more"
        return
    spread = np.abs(found).max(initial=0.0)
    rounding = _HALF if _of_halves(before, own) else _ROUNDING
    limit = rounding * (np.abs(old) + spread)
    if again:  # made anew of the weight with its vectors: half a step of either codes
        limit = limit + 0.51 * find_coded(after, own, columns=columns).steps()[:, : old.shape[1]]
        limit += 0.51 * coded.steps()[:, : old.shape[1]] * np.abs(gain)
    if found.shape != old.shape or not (np.abs(found - old) <= limit).all():
        yield "its codes do not stand for the base's weight times the vectors"


def _of_halves(graph: GraphFile, own: str) -> bool:
    """Whether scales are float16 numbers, which were rounded again."""
    return any(
        graph.spans[part].dtype == "FLOAT16"
        for part in _parts(graph, own)
        if part.endswith(("scales", "scale"))
    )


def _same_bytes(one: Span, other: Span) -> bool:
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.offset)
        b.seek(other.offset)
        left = one.nbytes
        while left:
            step = min(left, _BLOCK)
            if a.read(step) != b.read(step):
                return False
            left -= step
    return True
