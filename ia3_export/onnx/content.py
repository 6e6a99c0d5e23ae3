"""Weights of a checkpoint in a graph whose names say nothing: found by their values.

As they are or transposed, widened or rounded to the graph's type, alone or packed with others (query, key and
value in one product), and as codes, which are within a step of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import Unsupported
from ia3_export.fold import Array, storage_dtype, to_float
from ia3_export.onnx.decoded import find_coded
from ia3_export.onnx.places import GraphFile, Place, outputs_last
from ia3_export.onnx.spans import Span
from ia3_export.words import ONNX_FLOATS

#: Rounding moves a value by half a step, a rounded zero point by another half.
_STEPS = 1.01
#: Elements of a row by which it is looked for among many.
_START = 16
#: Columns of a block, at most.
_LARGEST = 256


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """Some whole rows of a tensor of `shape`, float32: what is the same in all of them is the same tensor."""

    shape: tuple[int, int]
    rows: Mapping[int, Array]


def content_places(
    graph: GraphFile, tensors: Mapping[str, StoredTensor], taken: Collection[str]
) -> dict[str, list[Place]]:
    """The places of `tensors` in `graph`, among the initializers that are not `taken`. Tensors of zeros are
    not looked for: nothing changes in them."""
    probes = {name: probe for name, tensor in tensors.items() if (probe := probe_of(tensor)) is not None}
    found: dict[str, list[Place]] = {}
    for own in [own for own in graph.coded if own not in taken and graph.spans[graph.coded[own]].nbytes > 1]:
        for name, place in _among_codes(graph, own, probes):
            found.setdefault(name, []).append(place)
    for name, span in graph.spans.items():
        if name not in taken and span.dtype in ONNX_FLOATS and span.nbytes and span.shape:
            for tensor, place in _in_floats(span, probes):
                found.setdefault(tensor, []).append(place)
    return found


def probe_of(tensor: StoredTensor) -> _Probe | None:
    """Three rows of a matrix or vector; None for tensors of more axes, and for rows of zeros."""
    if not tensor.shape or not tensor.size or tensor.dtype not in ("F64", "F32", "F16", "BF16"):
        return None
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    columns = tensor.size // rows
    picked = {row: elements(tensor, row * columns, columns) for row in {0, rows // 2, rows - 1}}
    return _Probe((rows, columns), picked) if any(values.any() for values in picked.values()) else None


def elements(tensor: StoredTensor, first: int, count: int) -> Array:
    """Elements of a stored tensor, float32."""
    stored = storage_dtype(tensor.dtype)
    if tensor.computed is not None:
        unit = tensor.computed.unit
        begin = first // unit * unit
        end = min(-(-(first + count) // unit) * unit, tensor.size)
        raw = tensor.computed.read(begin, end - begin)[first - begin :][:count]
    elif tensor.data is not None:
        raw = tensor.data.view(stored)[first : first + count]
    else:
        raw = np.fromfile(tensor.file, stored, count, offset=tensor.offset + first * stored.itemsize)
    return to_float(raw, tensor.dtype).astype("<f4")


def _in_floats(span: Span, probes: Mapping[str, _Probe]) -> Iterator[tuple[str, Place]]:
    dtype = ONNX_FLOATS[span.dtype]
    array = np.memmap(span.file, storage_dtype(dtype), "r", span.offset, span.shape)
    whole = array.reshape(len(array), -1) if array.ndim > 1 else array[None]
    for name, probe in probes.items():
        rows = probe.rows
        for transposed in (False, True) if array.ndim == 2 else (False,):
            view = whole.T if transposed else whole
            if array.ndim == 1 and probe.shape[0] == 1 and view.shape[1] > probe.shape[1]:
                yield from ((name, place) for place in _in_a_row(span, view[0], rows[0], dtype))
            for first in _starts(view, probe, dtype):
                if all(_near(view[first + row], values, dtype).all() for row, values in rows.items()):
                    yield name, _place(span.name, view, probe, first, transposed=transposed)


def _near(raw: Array, wanted: Array, dtype: str) -> Array:
    """Whether stored bits are the numbers `wanted`, rounded: ONNX Runtime's converter to float16 moves the
    smallest ones away from zero."""
    values = to_float(raw.reshape(-1), dtype).reshape(raw.shape)
    if dtype in ("F32", "F64"):
        return np.asarray(values == wanted)
    return np.asarray(np.abs(values - wanted) <= 2.0**-8 * np.abs(wanted) + 2e-7)


def _in_a_row(span: Span, values: Array, wanted: Array, dtype: str) -> Iterator[Place]:
    """Biases that lie behind one another."""
    for first in np.flatnonzero(_near(values[: len(values) - len(wanted) + 1], wanted[0], dtype)):
        if _near(values[first : first + len(wanted)], wanted, dtype).all():
            yield Place(name=span.name, transposed=False, first=int(first), count=len(wanted))
            return


def _starts(view: Array, probe: _Probe, dtype: str) -> Sequence[int]:
    """The rows of `view` at which the tensor may begin."""
    if view.shape[1] != probe.shape[1] or view.shape[0] < probe.shape[0]:
        return ()
    if view.shape[0] == probe.shape[0]:
        return (0,)
    last = view.shape[0] - probe.shape[0] + 1
    near = _near(view[:last, :_START], probe.rows[0][:_START], dtype)
    return [int(i) for i in np.flatnonzero(near.all(1))]


def _place(name: str, view: Array, probe: _Probe, first: int, *, transposed: bool) -> Place:
    place = Place(name=name, transposed=transposed)
    return place if view.shape[0] == probe.shape[0] else replace(place, first=first, count=probe.shape[0])


def _among_codes(graph: GraphFile, own: str, probes: Mapping[str, _Probe]) -> Iterator[tuple[str, Place]]:
    transposed = outputs_last(graph, own)
    try:
        weight = find_coded(graph, own)
        values, steps = weight.values(), weight.steps()
    except Unsupported:
        return
    if values.ndim != 2:
        return
    for name, probe in probes.items():
        spare = values.shape[1] - probe.shape[1]  # what fills the last block
        if not 0 <= spare < _LARGEST or values.shape[0] < probe.shape[0]:
            continue
        last = values.shape[0] - probe.shape[0] + 1
        near = np.abs(values[:last, :_START] - probe.rows[0][:_START]) <= _STEPS * steps[:last, :_START]
        for first in np.flatnonzero(near.all(1)):
            apart = [
                (
                    np.abs(values[first + row, : len(wanted)] - wanted)
                    <= _STEPS * steps[first + row, : len(wanted)]
                ).all()
                for row, wanted in probe.rows.items()
            ]
            if all(apart):
                yield name, _place(own, values, probe, int(first), transposed=transposed)
                break
