"""Vectors folded into the initializers of a graph that exists already: nothing is traced.

Floats are multiplied where they lie, block by block. Codes stay what they are: a vector on the outputs goes
into their scales (and offsets), which float32 holds as exactly as any weight. A vector on the inputs of codes
has no scale to go to: the weight becomes a float32 one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.header import StoredTensor, read_values
from ia3_export.errors import Unsupported
from ia3_export.fold import (
    Array,
    Direction,
    Scale,
    Workspace,
    fold_block,
    from_float,
    round_values,
    scale_values,
    storage_dtype,
    to_float,
)
from ia3_export.onnx.blocks import encode
from ia3_export.onnx.decoded import (
    DENSE,
    CodedWeight,
    dense_form,
    find_coded,
    outputs_first_shape,
    read_span,
    rewire,
    scales_of,
)
from ia3_export.onnx.places import GraphFile, Place, outputs_last
from ia3_export.onnx.spans import Span
from ia3_export.words import ONNX_FLOATS

_ONNX = {stored: name for name, stored in ONNX_FLOATS.items()}
#: Elements that are folded at a time.
_STEP = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class NewTensor:
    """What an initializer becomes: its element type (ONNX's number), shape, and bytes, made block by
    block."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        import onnx

        width: int = onnx.helper.tensor_dtype_to_np_dtype(self.data_type).itemsize
        return prod(self.shape) * width


@dataclass(frozen=True, slots=True, eq=False)
class PlacedVector:
    """A vector on one side of a stored tensor of `shape`, which the model has in `dtype`."""

    scale: Scale
    direction: Direction
    shape: tuple[int, ...]
    dtype: str


@dataclass(slots=True, eq=False, kw_only=True)
class Rewriting:
    """What becomes of a `graph`; `plain` is the float32 one of the same export.

    `new` initializers by name, and the weights that are `dense` now. `folds` and `rows` are the vectors noted
    for floats and for codes, `heads` tensors of adapters, `brought` their stored bits by initializer;
    `rewired`: nodes are others, too.
    """

    graph: GraphFile
    plain: GraphFile | None = None
    new: dict[str, NewTensor] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    rewired: bool = False
    brought: dict[str, Array] = field(default_factory=dict)
    heads: list[tuple[Place, StoredTensor]] = field(default_factory=list)
    folds: dict[str, list[tuple[Place, PlacedVector]]] = field(default_factory=dict)
    rows: dict[str, list[tuple[Place, PlacedVector]]] = field(default_factory=dict)

    @property
    def placed(self) -> list[tuple[Place, PlacedVector]]:
        """Every vector, and where it lies."""
        return [one for laid in (*self.folds.values(), *self.rows.values()) for one in laid]

    def fold(self, place: Place, laid: PlacedVector) -> None:
        """Note a vector; `finish` makes tensors of all of them.

        Raises `Unsupported` where the place cannot take it.
        """
        if place.name in self.graph.coded:
            self.rows.setdefault(place.name, []).append((place, laid))
            return
        span = self.graph.spans[place.name]
        if span.dtype not in ONNX_FLOATS:
            raise Unsupported(
                f"{self.graph.path.name} holds {place.name} as {span.dtype}, which takes no vector",
                hint="export the merged model instead",
            )
        held = span.shape[::-1] if place.transposed else span.shape
        if place.count is None and held != laid.shape:
            raise Unsupported(
                f"{self.graph.path.name} holds {place.name} as {list(span.shape)}, where "
                f"{list(laid.shape)}{' transposed' * place.transposed} is expected",
                hint="the graph was made of another model, or its manifest is not its own",
            )
        self.folds.setdefault(place.name, []).append((place, laid))

    def replace(self, place: Place, tensor: StoredTensor) -> None:
        """Put a tensor of an adapter in the place of one of the same shape (a head); codes become float32
        numbers.

        Raises `Unsupported` for another shape.
        """
        name, dtype = f"{place.name}{DENSE}", "F32"
        if place.name in self.graph.coded:
            shape = outputs_first_shape(self.graph, place.name, tensor.shape[-1])
            held = dense_form(read_values(tensor)) if tensor.shape == shape else np.empty(0)
            for part, array in rewire(self.graph, place.name).items():
                self._set(part, array)
            self.dense.append(place.name)
            self.rewired = True
        else:
            span = self.graph.spans[place.name]
            name, dtype, shape = place.name, ONNX_FLOATS.get(span.dtype, ""), span.shape
            held = oriented(read_values(tensor), place, dtype) if dtype else np.empty(0)
        if held.size != prod(shape) or sorted(held.shape) != sorted(shape):
            raise Unsupported(
                f"the adapter brings {tensor.name} of shape {list(tensor.shape)}, {self.graph.path.name} has "
                f"{list(shape)}",
                hint="another number of labels needs a graph of its own: export the merged model",
            )
        self.heads.append((place, tensor))
        self.brought[name] = held
        raw = held.tobytes()
        self.new[name] = NewTensor(name, _number(_ONNX[dtype]), held.shape, lambda: iter([raw]))

    def finish(self) -> None:
        """Make the new tensors of the vectors that were noted."""
        for name, laid in self.folds.items():
            span = self.graph.spans[name]
            scales = tuple(_turned(one, place, span.shape) for place, one in laid)
            make = partial(_folded, span, scales, laid[0][1].dtype)
            self.new[name] = NewTensor(name, _number(span.dtype), span.shape, make)
        for own, rows in self.rows.items():
            if all(one.direction == "out" for _, one in rows):
                self._scale_codes(own, rows)
            elif not self._encode(own, rows):
                self._widen(own, rows)

    def _scale_codes(self, own: str, laid: Sequence[tuple[Place, PlacedVector]]) -> None:
        found = scales_of(self.graph, own)
        self.rewired |= bool(found.spread)
        factors = np.ones(found.outputs, "<f4")
        for place, one in laid:
            factors[place.first :][: len(one.scale.factors)] *= one.scale.factors.astype("<f4")
        for name, array in found.scaled(factors).items():
            self._set(name, array)

    def _encode(self, own: str, laid: Sequence[tuple[Place, PlacedVector]]) -> bool:
        """Make the 8-bit codes of a weight anew, of what the float32 graph beside has, with its vectors;
        False where none has what these codes were made of."""
        if self.plain is None or own not in self.plain.spans:
            return False
        plain = self.plain.spans[own]
        if plain.dtype != "FLOAT" or len(plain.shape) != 2:
            return False
        columns = next(len(one.scale.factors) for _, one in laid if one.direction == "in")
        weight = find_coded(self.graph, own, columns=columns)
        turned = outputs_last(self.plain, own)
        if weight.bits != 8 or weight.zeros is not None:
            return False
        made = encode(_outputs_first(read_span(plain), turned=turned), 8)
        if not np.array_equal(made.packed, read_span(weight.codes)):
            return False
        # names of codes do not tell how the float32 graph holds the weight
        scales = tuple(_along(one, place, plain.shape, turned=turned) for place, one in laid)
        folded = partial(_folded_matrix, plain, scales, laid[0][1].dtype, turned=turned)
        for span, part in ((weight.codes, "packed"), (weight.scales, "scales")):
            self._later(span.name, part, folded, span)
        return True

    def _later(self, name: str, part: str, folded: Callable[[], Array], span: Span) -> None:
        """A part of the codes of a weight, made when it is written, its scales in float32."""
        kind = _number("FLOAT" if part == "scales" else span.dtype)

        def blocks() -> Iterator[Any]:
            array: Array = getattr(encode(folded(), 8), part)
            yield np.ascontiguousarray(array).reshape(-1).view("u1").data

        self.new[name] = NewTensor(name, kind, span.shape, blocks)

    def _widen(self, own: str, laid: Sequence[tuple[Place, PlacedVector]]) -> None:
        """Hold a weight of codes as float32 numbers, with its vectors folded in."""
        columns = next(len(one.scale.factors) for _, one in laid if one.direction == "in")
        if any(one.scale.axis(one.shape) is None for _, one in laid):
            raise Unsupported(f"{own} is a convolution in groups", hint="export the merged model instead")
        weight = find_coded(self.graph, own, columns=columns)
        for name, array in rewire(self.graph, own).items():
            self._set(name, array)
        shape = weight.codes.shape
        if weight.bits is not None:
            shape = (weight.columns or columns, shape[0])
        elif len(shape) == 2 and weight.axis == 0:
            shape = shape[::-1]
        self.dense.append(own)
        self.rewired = True
        name = f"{own}{DENSE}"
        self.new[name] = NewTensor(name, _number("FLOAT"), shape, partial(_dense_blocks, weight, tuple(laid)))

    def _set(self, name: str, array: Array) -> None:
        import onnx

        raw = np.ascontiguousarray(array)
        kind = onnx.helper.np_dtype_to_tensor_dtype(raw.dtype)
        self.new[name] = NewTensor(name, kind, raw.shape, lambda: iter([raw.reshape(-1).view("u1").data]))


def _dense_blocks(weight: CodedWeight, laid: Sequence[tuple[Place, PlacedVector]]) -> Iterator[Any]:
    """The bytes of a weight of codes in float32, with its vectors folded in."""
    values = weight.values()
    for place, one in laid:
        on_rows = one.direction == "out"
        part = values[place.first :][: len(one.scale.factors)] if on_rows else values
        along = (-1, *(1,) * (part.ndim - 1)) if on_rows else (1, -1, *(1,) * (part.ndim - 2))
        part *= one.scale.factors.astype("<f4").reshape(along)
    yield dense_form(values).reshape(-1).view("u1").data


def _folded_matrix(span: Span, scales: Sequence[Scale], rounded: str, *, turned: bool) -> Array:
    """A float32 matrix with its vectors folded in, outputs first."""
    raw = b"".join(bytes(block) for block in _folded(span, scales, rounded))
    return _outputs_first(np.frombuffer(raw, "<f4").reshape(span.shape), turned=turned)


def _outputs_first(matrix: Array, *, turned: bool) -> Array:
    return np.ascontiguousarray(matrix.T if turned else matrix)


def oriented(values: Array, place: Place, dtype: str) -> Array:
    """The stored `values` of a tensor as an initializer at `place` holds them, in the stored bits of
    `dtype`."""
    turned = values.T if place.transposed and values.ndim == 2 else values
    return from_float(np.array(turned.reshape(-1), order="C"), dtype).reshape(turned.shape)


def _number(dtype: str) -> int:
    import onnx

    number: int = onnx.TensorProto.DataType.Value(dtype)
    return number


def _turned(laid: PlacedVector, place: Place, shape: tuple[int, ...]) -> Scale:
    """The vector over an initializer of `shape`, which holds its tensor at `place`."""
    scale, axis = laid.scale, laid.scale.axis(laid.shape)
    if not place.transposed and place.count is None:
        return scale
    if axis is None or len(laid.shape) > 2:
        raise Unsupported(
            f"{place.name} is no matrix, and is held in another form than it is stored in",
            hint="export the merged model instead",
        )
    if len(shape) == 1:
        axis = 0
    elif place.transposed:
        axis = 1 - axis
    factors = scale.factors
    if place.count is not None:
        if laid.direction == "in":
            raise Unsupported(
                f"{place.name} holds several weights, whose input a vector would multiply together",
                hint="export the merged model instead",
            )
        factors = np.ones(shape[axis], factors.dtype)
        factors[place.first :][: place.count] = scale.factors
    return Scale(factors, prod(shape[axis + 1 :]))


def _along(laid: PlacedVector, place: Place, shape: tuple[int, ...], *, turned: bool) -> Scale:
    """The vector over a matrix of `shape`, whose outputs come last if it is `turned`."""
    axis = int((laid.direction == "in") != turned)
    factors = np.ones(shape[axis], laid.scale.factors.dtype)
    factors[place.first :][: len(laid.scale.factors)] = laid.scale.factors
    return Scale(factors, prod(shape[axis + 1 :]))


def _folded(span: Span, scales: Sequence[Scale], rounded: str) -> Iterator[Any]:
    """The bytes of a float initializer with `scales` folded in.

    Numbers that all are ones of `rounded`, the dtype of the model, were widened from it, and are rounded to
    it again: a merge of what is stored does the same.
    """
    dtype = ONNX_FLOATS[span.dtype]
    kept = rounded if dtype in ("F32", "F16") and fits(span, rounded) else dtype
    work = Workspace()
    for raw, first in raw_blocks(span, max(scale.inner for scale in scales)):
        if dtype == "F64" or kept == dtype:
            yield fold_block(raw, first, dtype, dtype, scales, work).view("u1").data
            continue
        values = to_float(raw, dtype, work)
        for scale in scales:
            scale_values(values, first, scale)
            round_values(values, kept, work)
        yield from_float(values, dtype, work).view("u1").data


def raw_blocks(span: Span, unit: int = 1) -> Iterator[tuple[Array, int]]:
    """The stored bits of a float initializer, block by block, each a whole number of `unit` elements where
    one fits, with the index of its first element; a block is valid until the next."""
    stored = storage_dtype(ONNX_FLOATS[span.dtype])
    step, total = max(_STEP // unit, 1) * unit, span.nbytes // stored.itemsize
    buffer = np.empty(min(step, max(total, 1)), stored)
    with span.file.open("rb", buffering=0) as file, ranges.reading(span.file, span.name):
        for first in range(0, total, len(buffer)):
            part = buffer[: min(len(buffer), total - first)]
            ranges.read_into(file.fileno(), part.view("u1").data, span.offset + first * stored.itemsize)
            yield part, first


def fits(span: Span, dtype: str) -> bool:
    """Whether all numbers of a float initializer are ones of `dtype`, so that it may have been widened."""
    own = ONNX_FLOATS[span.dtype]
    if dtype not in ("BF16", "F16") or own == dtype:
        return False
    for raw, _ in raw_blocks(span):
        if own == "F32" and dtype == "BF16":
            if np.bitwise_or.reduce(raw.view("<u4")) & 0xFFFF:
                return False
            continue
        values = to_float(raw, own)
        wide = values.copy()
        round_values(wide, dtype)
        if not np.array_equal(wide, values, equal_nan=True):
            return False
    return True
