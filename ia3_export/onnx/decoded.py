"""Codes of a weight in a graph that exists already: their scales, and the float32 weight that they stand for.

Of `MatMulNBits` (ours and ONNX Runtime's), of ``quantize_dynamic`` (``MatMulInteger``) and behind a
``DequantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.onnx.blocks import Codes, decode
from ia3_export.onnx.places import PRODUCTS, GraphFile, outputs_last
from ia3_export.onnx.spans import Span

_PARTS = ("scales", "offsets", "zero_points", "order")
#: What the name of a weight ends in that was made float32 of its codes.
DENSE = "_dense"
_HINT = "export the merged model instead"


@dataclass(frozen=True, slots=True, eq=False)
class ScalesOfCodes:
    """The scales (and offsets) of a weight with so many `outputs`: `arrays` by name, with the outputs as
    their first axis, or one number for all of them. `spread` are ``DequantizeLinear`` nodes with one number,
    that then have one an output along the given axis, and `zeros` their zero points."""

    outputs: int
    arrays: Mapping[str, Array]
    spread: tuple[tuple[Any, int], ...] = ()
    zeros: Mapping[str, Array] = field(default_factory=dict)
    halves: frozenset[str] = frozenset()

    def scaled(self, factors: Array) -> dict[str, Array]:
        """The arrays multiplied by `factors` (outputs,): in float32, or in float16 where a graph computes in
        it (`halves`)."""
        found = {name: np.broadcast_to(zero.reshape(()), factors.shape) for name, zero in self.zeros.items()}
        for name, array in self.arrays.items():
            wide = array.astype("<f4")
            if wide.size == 1:
                product = wide.reshape(()) * factors
            else:
                product = (wide.reshape(self.outputs, -1) * factors[:, None]).reshape(wide.shape)
            found[name] = product.astype("<f2") if name in self.halves else product
        for node, axis in self.spread:
            _set_axis(node, axis)
        return found


def scales_of(graph: GraphFile, own: str) -> ScalesOfCodes:
    """The scales (and offsets) of the weight `own`.

    Raises `Unsupported` for codes whose scales lie along the inputs, or in operators that take none an
    output.
    """
    codes = graph.coded[own]
    shape = graph.spans[codes].shape
    if not in_blocks(codes, shape):
        return _of_axis(graph, own)
    named = [_named(graph, own + ending) for ending in ("_scales", "_offsets")]
    arrays = {name: values_of(graph, name) for name in named if name is not None}
    if named[0] is None or any(array.size % shape[0] for array in arrays.values()):
        raise Unsupported(f"{graph.path.name} has no scales for {codes}", hint=_HINT)
    return ScalesOfCodes(shape[0], arrays, halves=_halves(graph, arrays))


def outputs_first_shape(graph: GraphFile, own: str, columns: int) -> tuple[int, ...]:
    """The shape of the weight that codes stand for, outputs first.

    Where no product says how many inputs there are, so many `columns` if the last block can hold them.
    """
    shape = graph.spans[graph.coded[own]].shape
    if not in_blocks(graph.coded[own], shape):
        return shape[::-1] if outputs_last(graph, own) else shape
    weight = find_coded(graph, own, columns=columns)
    block = shape[2] * 8 // (weight.bits or 8)
    held = weight.columns or 0
    return (shape[0], held) if -(-held // block) == shape[1] else shape


def in_blocks(codes: str, shape: Sequence[int]) -> bool:
    """Whether an initializer of this name and shape has the codes of ``MatMulNBits``."""
    return len(shape) == 3 and not codes.rstrip("_").endswith("quantized")


def _of_axis(graph: GraphFile, own: str) -> ScalesOfCodes:
    """The scale of ``X_quantized``, one number or one for each output."""
    codes = graph.coded[own]
    shape = graph.spans[codes].shape
    axis = len(shape) - 1 if outputs_last(graph, own) else 0
    nodes = graph.readers.get(codes, ())
    _check_readers(graph, own, nodes)
    widened = [node for node in nodes if node.op_type == "DequantizeLinear"]
    named = {node.input[1] for node in widened} or {_named(graph, f"{own}_scale")}
    name = next(iter(named))
    if len(named) != 1 or name not in graph.spans:
        raise Unsupported(f"{graph.path.name} has no scale for {codes}", hint=_HINT)
    array = values_of(graph, name)
    if array.shape == (shape[axis],) and array.size > 1:
        return ScalesOfCodes(shape[axis], {name: array}, halves=_halves(graph, {name: array}))
    if array.size != 1:
        raise Unsupported(
            f"{graph.path.name} holds {own} with {array.size} scales for {shape[axis]} outputs", hint=_HINT
        )
    if len(graph.readers.get(name, ())) > 1:
        raise Unsupported(f"{graph.path.name} uses the scale {name} for more than {own}", hint=_HINT)
    zeros = {n: values_of(graph, n) for node in widened for n in node.input[2:3] if n in graph.spans}
    spread = tuple((node, axis) for node in widened)
    return ScalesOfCodes(shape[axis], {name: array}, spread, zeros, _halves(graph, {name: array}))


def _halves(graph: GraphFile, arrays: Mapping[str, Array]) -> frozenset[str]:
    """The float16 ones that a graph does not widen before it computes with them."""
    return frozenset(
        name
        for name, array in arrays.items()
        if array.dtype == np.float16 and any(n.op_type != "Cast" for n in graph.readers.get(name, ()))
    )


def _check_readers(graph: GraphFile, own: str, nodes: Any) -> None:
    """Raise `Unsupported` where what the weight gives is rounded again by a scale that was measured on the
    base."""
    for node in nodes:
        if node.op_type.startswith("QLinear"):
            raise Unsupported(
                f"{graph.path.name} multiplies with {own} in a {node.op_type}, whose output has a scale "
                "that was measured on the base",
                hint=_HINT,
            )
        if node.op_type not in ("MatMulInteger", "DequantizeLinear", "DynamicQuantizeMatMul"):
            raise Unsupported(
                f"{graph.path.name} multiplies with {own} in a {node.op_type}, which takes no vector here",
                hint=_HINT,
            )
        after = [n for name in node.output for n in graph.readers.get(name, ())]
        later = [n for one in after for name in one.output for n in graph.readers.get(name, ())]
        if node.op_type == "DequantizeLinear" and any(n.op_type == "QuantizeLinear" for n in later):
            raise Unsupported(
                f"{graph.path.name} rounds what {own} gives by a scale that was measured on the base: the "
                "site cannot take a vector",
                hint="quantize the merged model; or weights alone, whose activations are not rounded by "
                "fixed scales",
            )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodedWeight:
    """Where the codes of a weight and what belongs to them lie, so that they can be read later, when the
    graph may be another. Of codes in blocks (`bits` of them) `columns` are the inputs, None where those that
    fill the last block cannot be told; others have one scale, or one for each index of `axis`, that of the
    outputs."""

    codes: Span
    scales: Span
    offsets: Span | None = None
    zeros: Span | None = None
    order: Span | None = None
    bits: int | None = None
    columns: int | None = None
    axis: int = 0

    @property
    def held(self) -> Codes:
        """The codes in blocks."""
        rows = self.codes.shape[0]
        zeros = None if self.zeros is None else read_span(self.zeros).reshape(rows, -1)
        return Codes(
            packed=read_span(self.codes),
            scales=read_span(self.scales).astype("<f4").reshape(rows, -1),
            offsets=None if self.offsets is None else read_span(self.offsets).astype("<f4").reshape(rows, -1),
            bits=self.bits or 8,
            zeros=zeros,
            order=None if self.order is None else read_span(self.order),
        )

    def values(self) -> Array:
        """The float32 weight that the codes stand for, outputs first."""
        if self.bits is not None:
            held = self.held
            return decode(held, self.columns or self.codes.shape[1] * held.block)
        raw, scale = read_span(self.codes).astype("<f4"), read_span(self.scales).astype("<f4")
        zero = np.zeros(1, "<f4") if self.zeros is None else read_span(self.zeros).astype("<f4")
        along = [-1 if i == self.axis else 1 for i in range(raw.ndim)]
        values = raw - zero.reshape(along if zero.size > 1 else ())
        values *= scale.reshape(along if scale.size > 1 else ())
        return np.ascontiguousarray(np.moveaxis(values, self.axis, 0))

    def steps(self) -> Array:
        """How far two neighbouring codes are apart, for each element, outputs first."""
        scales = np.abs(read_span(self.scales).astype("<f4"))
        if self.bits is not None:
            rows, blocks, _ = self.codes.shape
            return np.repeat(scales.reshape(rows, blocks), self.held.block, axis=1)
        shape = self.codes.shape if self.axis == 0 else self.codes.shape[::-1]
        return np.broadcast_to(scales.reshape(-1, *(1,) * (len(shape) - 1)), shape)


def find_coded(graph: GraphFile, own: str, *, columns: int | None = None) -> CodedWeight:
    """The codes of the weight `own`, which has so many `columns` (inputs), if that is known.

    Raises `Unsupported` for codes of an unknown form.
    """
    name = graph.coded[own]
    codes = graph.spans[name]
    if not in_blocks(name, codes.shape):
        ((scales, _),) = _of_axis(graph, own).arrays.items()
        axis = len(codes.shape) - 1 if outputs_last(graph, own) else 0
        zero = _named(graph, f"{own}_zero_point")
        return CodedWeight(
            codes=codes, scales=graph.spans[scales], zeros=graph.spans[zero] if zero else None, axis=axis
        )
    options = next((n.attribute for n in graph.readers.get(name, ()) if n.op_type == "MatMulNBits"), ())
    sizes = {attribute.name: attribute.i for attribute in options}
    found = {end: graph.spans[n] for end in _PARTS if (n := _named(graph, f"{own}_{end}")) is not None}
    if "scales" not in found:
        raise Unsupported(f"{graph.path.name} has no scales for {name}", hint=_HINT)
    return CodedWeight(
        codes=codes,
        scales=found["scales"],
        offsets=found.get("offsets"),
        zeros=found.get("zero_points"),
        order=found.get("order"),
        bits=sizes.get("bits", 8 if name.rstrip("_").endswith("8") else 4),
        columns=sizes.get("K", columns),
    )


def rewire(graph: GraphFile, own: str) -> dict[str, Array]:
    """Let the products read the weight `own` as the float32 initializer ``<own>_dense``, inputs x outputs of
    a matrix; returns initializers that change with it.

    Raises `Unsupported` for operators that it is not known how to replace.
    """
    name, changed = f"{own}{DENSE}", dict[str, Array]()
    for node, slot in products_of(graph, graph.coded[own]):
        if node.op_type == "MatMulNBits":
            _become(node, "MatMul", [node.input[0], name])
            offsets = _named(graph, f"{own}_offsets")
            if offsets is not None:  # in the weight now
                changed[offsets] = np.zeros_like(values_of(graph, offsets))
        elif node.op_type == "MatMulInteger":
            source, scaled = around(graph, node)
            _become(scaled, "MatMul", [source, name])
        elif node.op_type in ("MatMul", "Conv") or (node.op_type == "Gemm" and slot == 1):
            if node.op_type == "Gemm":
                kept = [a for a in node.attribute if a.name != "transB"]
                del node.attribute[:]
                node.attribute.extend(kept)
            node.input[slot] = name
        else:
            raise Unsupported(
                f"{graph.path.name} multiplies with {own} in a {node.op_type}, which takes no float32 weight",
                hint=_HINT,
            )
    return changed


def dense_form(values: Array) -> Array:
    """A weight, outputs first, as `rewire` wants it."""
    return np.ascontiguousarray(values if values.ndim > 2 else values.T, "<f4")


def values_of(graph: GraphFile, name: str) -> Array:
    """The values of an initializer, in its shape."""
    return read_span(graph.spans[name])


def read_span(span: Span) -> Array:
    """The values in a span, in its shape."""
    import onnx

    with span.file.open("rb") as file:
        file.seek(span.offset)
        raw = file.read(span.nbytes)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(span.dtype))
    return np.frombuffer(raw, dtype).reshape(span.shape)


def _named(graph: GraphFile, name: str) -> str | None:
    """The initializer of this name, which may have underscores after it that keep it apart from another."""
    return next((n for n in graph.spans if n == name or n.rstrip("_") == name.rstrip("_")), None)


def products_of(graph: GraphFile, codes: str) -> list[tuple[Any, int]]:
    """The nodes that multiply with what is made of `codes`, and which of their inputs that is."""
    found: list[tuple[Any, int]] = []
    waiting, seen = [codes], {codes}
    while waiting:
        value = waiting.pop()
        for node in graph.readers.get(value, ()):
            slot = list(node.input).index(value)
            if node.op_type in PRODUCTS:
                found.append((node, slot))
            elif node.op_type in ("Gather", "Shape"):
                raise Unsupported(f"{graph.path.name} looks rows of {codes} up as well", hint=_HINT)
            elif not all(_is_constant(graph, name) for name in node.input):
                raise Unsupported(
                    f"{graph.path.name} computes with {codes} in a {node.op_type}, which is not known here",
                    hint=_HINT,
                )
            else:
                new = [name for name in node.output if name not in seen]
                waiting += new
                seen.update(new)
    return found


def _is_constant(graph: GraphFile, name: str) -> bool:
    """Whether a value is made of initializers alone."""
    waiting, seen = [name], {name}
    while waiting:
        value = waiting.pop()
        if value in graph.constants:
            continue
        if value not in graph.makers:
            return False
        new = [source for source in graph.makers[value].input if source not in seen]
        waiting += new
        seen.update(new)
    return True


def around(graph: GraphFile, node: Any) -> tuple[str, Any]:
    """What ``quantize_dynamic`` made a ``MatMulInteger`` of: the float32 input, and the last node, which
    gives the product in float32."""
    maker = graph.makers.get(node.input[0])
    casts = graph.readers.get(node.output[0], ())
    if maker is not None and maker.op_type == "DynamicQuantizeLinear" and len(casts) == 1:
        scaled = graph.readers.get(casts[0].output[0], ())
        if casts[0].op_type == "Cast" and len(scaled) == 1 and scaled[0].op_type == "Mul":
            return maker.input[0], scaled[0]
    raise Unsupported(
        f"{graph.path.name} computes {node.name or node.output[0]} in a form that quantize_dynamic does "
        "not write",
        hint=_HINT,
    )


def _become(node: Any, op_type: str, inputs: list[str]) -> None:
    node.op_type, node.domain = op_type, ""
    del node.attribute[:]
    node.input[:] = inputs


def _set_axis(node: Any, axis: int) -> None:
    import onnx

    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("axis", axis)])
