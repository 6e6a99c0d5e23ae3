"""What became of a tensor that is not what it must be: hypotheses, each tried on the bytes themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.fold import FLOAT_DTYPES, Array, Scale, round_vector, to_float
from ia3_export.parity.bits.expected import Expected, Reader, blocks, equal
from ia3_export.report.model import TensorFinding

Failed = tuple[Expected, StoredTensor]

#: What a changed tensor is called that has the base's bytes.
LEFT_OUT, HEAD_NOT_REPLACED, BIAS_FORGOTTEN = "left out", "head not replaced", "bias forgotten"


def diagnose(
    failed: Sequence[Failed], rows: Mapping[str, Expected], *, limit: int
) -> Iterator[TensorFinding]:
    """A finding for each of the `failed` tensors; `rows` are all tensors as they must be, by name.

    Beyond `limit` tensors only the fact is stated, because every hypothesis reads the tensor again.
    """
    for i, (row, tensor) in enumerate(failed):
        if i >= limit:
            yield TensorFinding(row.name, "differs", "not examined further")
            continue
        yield next(_explain(row, tensor, [r for r, _ in failed], rows))


def left_out(row: Expected) -> tuple[str, str]:
    """What to call it when a changed tensor has the base's bytes, in three words and in a sentence."""
    if row.how in ("replace", "add"):
        return HEAD_NOT_REPLACED, "it has the base's bytes, the adapter brings others"
    if len(row.source.shape) == 1:
        return BIAS_FORGOTTEN, "it has the base's bytes: the output vector was not folded into the bias"
    return LEFT_OUT, "it has the base's bytes: the vector was not folded"


def _explain(
    row: Expected, tensor: StoredTensor, failed: Sequence[Expected], rows: Mapping[str, Expected]
) -> Iterator[TensorFinding]:
    """Explanations, the likeliest first; the last one always holds."""

    def finding(what: str, detail: str) -> TensorFinding:
        return TensorFinding(row.name, what, detail)

    base = row.base if row.changed and row.base is not None and row.base.shape == tensor.shape else None
    if base is not None and equal(replace(row, source=base, scales=()), tensor):
        yield finding(*left_out(row))
    for what, scales in _other_folds(row):
        if equal(replace(row, scales=scales), tensor):
            yield finding(what, f"it equals the base with the vector {what}")
    for other in failed:
        same = (other.dtype, other.source.shape) == (row.dtype, row.source.shape)
        if other is not row and same and equal(other, tensor):
            yield finding("swapped", f"it holds what {other.name} must hold")
    for other in rows.values():
        fits = other.source.shape == row.source.shape and other.scales and other is not row
        if fits and equal(replace(row, scales=other.scales), tensor):
            yield finding("wrong vector", f"it equals the base with the vector of {other.name}")
    yield _numbers(row, tensor)


def _other_folds(row: Expected) -> Iterator[tuple[str, tuple[Scale, ...]]]:
    """Wrong ways to fold the vectors of `row`, by name."""
    if not row.scales:
        return
    yield "applied twice", row.scales + row.scales
    for i in range(len(row.scales) if len(row.scales) > 1 else 0):
        yield f"number {i + 1} left out", row.scales[:i] + row.scales[i + 1 :]
        yield f"number {i + 1} applied twice", (*row.scales, row.scales[i])
    if len(row.scales) > 1:
        yield "folded in another order", row.scales[::-1]
    yield "divided out", tuple(_with(scale, _reciprocal) for scale in row.scales)
    yield "rounded to the base's dtype first", tuple(_rounded(scale, row.dtype) for scale in row.scales)
    turned = [_turned(scale, row.source.shape) for scale in row.scales]
    if all(turned):
        yield "applied on the wrong axis", tuple(scale for scale in turned if scale is not None)


def _turned(scale: Scale, shape: tuple[int, ...]) -> Scale | None:
    """`scale` laid over the other of the first two axes, where its length fits there."""
    if len(shape) < 2:
        return None
    of_first, of_second = int(np.prod(shape[1:])), int(np.prod(shape[2:]))
    if scale.inner == of_first and len(scale.factors) == shape[1]:
        return Scale(scale.factors, of_second)
    if scale.inner == of_second and len(scale.factors) == shape[0]:
        return Scale(scale.factors, of_first)
    return None


def _with(scale: Scale, change: Callable[[Array], Array]) -> Scale:
    return Scale(change(scale.factors), scale.inner)


def _reciprocal(factors: Array) -> Array:
    with np.errstate(divide="ignore"):
        return 1 / factors


def _rounded(scale: Scale, dtype: str) -> Scale:
    return _with(scale, lambda factors: round_vector(factors, dtype))


def _numbers(row: Expected, tensor: StoredTensor) -> TensorFinding:
    """How many elements differ, where, and by how much."""
    if row.source.dtype not in FLOAT_DTYPES:
        return TensorFinding(row.name, "differs", "its bytes are not the base's")
    shape = row.source.shape
    last = shape[-1] if shape else 1
    counts = np.zeros(max(1, int(np.prod(shape[:-1]))), dtype=np.int64)
    columns = np.zeros(last, dtype=np.int64)
    first: tuple[int, float, float] | None = None
    low, high = np.inf, -np.inf
    reader = Reader()
    with reader.stack:
        for wanted, found, start in blocks(row, tensor, reader):
            bits = f"<u{wanted.itemsize}"
            places = np.flatnonzero(wanted.view(bits) != found.view(bits))
            if not len(places):
                continue
            must = to_float(wanted.copy(), row.dtype).astype("<f8")[places]
            has = to_float(found.view(wanted.dtype).copy(), row.dtype).astype("<f8")[places]
            if first is None:
                first = start + int(places[0]), float(has[0]), float(must[0])
            np.add.at(counts, (start + places) // last, 1)
            np.add.at(columns, (start + places) % last, 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = has[must != 0] / must[must != 0]
            low, high = min(low, ratio.min(initial=low)), max(high, ratio.max(initial=high))
    assert first is not None
    total = int(counts.sum())
    index = [int(i) for i in np.unravel_index(first[0], shape)] if shape else []
    detail = (
        f"{total:,} of {row.source.size:,} elements differ, the first at {index}: {first[1]:.6g}, must be "
        f"{first[2]:.6g}"
    )
    touched_rows, touched_columns = np.flatnonzero(counts), np.flatnonzero(columns)
    if len(shape) >= 2 and len(touched_rows) == 1 and total > 1:
        where = [int(i) for i in np.unravel_index(int(touched_rows[0]), shape[:-1])]
        detail += f"; all in row {where[0] if len(where) == 1 else where}"
    elif len(shape) >= 2 and len(touched_columns) == 1 and total > 1:
        detail += f"; all in column {int(touched_columns[0])}"
    if np.isfinite(low) and np.isfinite(high):
        detail += f"; between {low + 0.0:.4g} and {high + 0.0:.4g} times what they must be"
    return TensorFinding(row.name, "differs", detail)
