"""Weights of 8 and 4 bits in blocks: the operators that ONNX Runtime computes with, placed weight by weight.

``onnxruntime.quantization`` makes the same nodes, but leaves out what our graphs are full of (``Gemm``,
weights that reach a ``MatMul`` through a ``Transpose`` or a ``Split``, tied heads) and holds all weights in
memory three times over. So its formats are used here, and its walk over the graph is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import BLOCK, Codes, encode
from ia3_export.onnx.kept import matching
from ia3_export.onnx.weights import Weight, constant, factor_of, is_weight, table_of

#: Activations are rounded to 8 bits, a scale for each block: decodes several times as fast as in float32.
_ACCURACY_LEVEL = 4
#: Activations stay float32.
_EXACT = 1
_CONTRIB = "com.microsoft"
_FLOAT = 1  # onnx.TensorProto.FLOAT


def quantize(
    model: Any,
    *,
    bits: int,
    dense: bool = False,
    given: Mapping[str, Codes] = MappingProxyType({}),
    kept: bool = False,
    left: Collection[str] = (),
) -> Any:
    """The pass that replaces the weights of an ``onnx_ir.Model`` by codes, in the bodies of ``If`` too.

    Products take codes of `bits` bits: ``MatMul`` and ``Gemm`` become ``MatMulNBits``, which computes with
    codes. With `dense` they are products of float32 weights that plain operators make of the codes; ONNX
    Runtime does that once, when a session is made. Of a weight that is `given` (outputs x inputs, by name)
    these are the codes.

    The rest has 8 bits:

    - the token embedding: rows of codes are looked up and multiplied by their scales, with plain operators.
      A tied embedding stays tied: lookup and head read the same codes;
    - batches of matrices (experts), always `dense`: no operator takes codes of them;
    - a ``Conv`` after ``DequantizeLinear``, with one scale for each output channel.

    Tables of positions stay float32: they are small, and all layers see their error.

    `left` are weights that stay float32: what adapters bring takes the place of their numbers.

    `kept`: nothing is rounded. The `given` codes alone are used, and only in the place of what they stand
    for; products of 4-bit codes leave activations as they are, and the others are `dense`, since ONNX Runtime
    has no kernel for 8-bit codes and float32 activations.
    """
    import onnx_ir

    written = _Written(model=model, bits=bits, dense=dense, given=given, kept=kept, left=frozenset(left))
    changed = False
    for node in list(model.graph.all_nodes()):
        if node.op_type in _READERS and not node.domain:
            tape = onnx_ir.tape.Tape()
            out = _READERS[node.op_type](written, tape, node)
            if out is not None:
                _replace(node, tape.nodes, out)
                changed = True
    written.cast_scales()
    return onnx_ir.passes.PassResult(model, changed)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Coded:
    """A weight in the graph: values of codes and scales, of offsets, zero points and the order of columns or
    None, with so many bits each, and the shape (rows, blocks, columns) that they stand for."""

    codes: Any
    scales: Any
    offsets: Any | None
    zeros: Any | None
    order: Any | None
    bits: int
    block: int
    shape: tuple[int, int, int]

    @property
    def for_products(self) -> bool:
        """Whether ``MatMulNBits`` computes with them exactly: of 4 bits, in whole blocks if they have
        offsets."""
        return self.bits == 4 and (self.offsets is None or self.shape[2] == self.shape[1] * self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What is there already and used again: codes of weights, and casts of their scales."""

    model: Any
    bits: int
    dense: bool
    given: Mapping[str, Codes]
    kept: bool
    left: frozenset[str]
    coded: dict[tuple[Any, bool], _Coded | None] = field(default_factory=dict)
    casts: list[Any] = field(default_factory=list)

    def code(self, weight: Weight, *, bits: int) -> _Coded | None:
        """Its codes, made with `bits` bits if they are not there or `given`; None if they may not be made."""
        if weight.value.name in self.left:
            return None
        key = (weight.value, weight.turned)
        if key not in self.coded:
            name, matrix = weight.value.name, weight.rows.reshape(-1, weight.rows.shape[-1])
            if self.kept:
                made = matching(self.given, name, matrix)
            else:  # offsets need whole blocks
                made = self.given.get(name) or encode(matrix, bits if matrix.shape[1] % BLOCK == 0 else 8)
            self.coded[key] = None if made is None else self._hold(name, made, matrix.shape[1])
        return self.coded[key]

    def _hold(self, name: str, made: Codes, columns: int) -> _Coded:
        return _Coded(
            codes=self.initializer(f"{name}_Q{made.bits}", made.packed),
            scales=self._scales(f"{name}_scales", made.scales, made.bits),
            offsets=None if made.offsets is None else self._halved(f"{name}_offsets", made.offsets),
            zeros=None if made.zeros is None else self.initializer(f"{name}_zero_points", made.zeros),
            order=None if made.order is None else self.initializer(f"{name}_order", made.order),
            bits=made.bits,
            block=made.block,
            shape=(*made.scales.shape, columns),
        )

    def initializer(self, name: str, array: Array) -> Any:
        """`array` as an initializer of the outermost graph, whose values the bodies of ``If`` see."""
        import onnx_ir

        there = self.model.graph.initializers
        while name in there and not np.array_equal(there[name].const_value.numpy(), array):
            name += "_"
        if name not in there:
            tensor = onnx_ir.tensor(array, name=name)
            self.model.graph.register_initializer(onnx_ir.Value(name=name, const_value=tensor))
        return there[name]

    def numbers(self, *values: int) -> Any:
        """A constant of int64."""
        return self.initializer(f"int64_{'_'.join(map(str, values))}", np.array(values))

    def _scales(self, name: str, scales: Array, bits: int) -> Any:
        """`scales` in float32, of `dense` weights stored as float16.

        ``MatMulNBits`` wants constants: in a session without optimizations, which leaves the cast where it
        is, it would give wrong numbers on x86, silently.
        """
        dense = self.dense or (self.kept and bits == 8)
        return self._halved(name, scales) if dense else self.initializer(name, scales)

    def _halved(self, name: str, array: Array) -> Any:
        """`array` in float32, stored as float16 if nothing is lost."""
        import onnx_ir

        with np.errstate(over="ignore"):
            halved = array.astype(np.float16)
        if not np.array_equal(halved, array):
            return self.initializer(name, array)
        stored = self.initializer(name, halved)
        cast = onnx_ir.node("Cast", [stored], {"to": _FLOAT}, name=f"{stored.name}_cast")
        cast.outputs[0].name = cast.name
        self.casts.append(cast)
        return cast.outputs[0]

    def cast_scales(self) -> None:
        """Put the casts where all bodies see them."""
        if self.casts:
            self.model.graph.insert_before(self.model.graph[0], self.casts)


def _matmul(written: _Written, tape: Any, node: Any) -> Any:
    """``x @ weight``, for ``Gemm`` with its bias."""
    weight = factor_of(node)
    if weight is None:
        return None
    batch = weight.rows.shape[:-2]
    coded = written.code(weight, bits=8 if batch else written.bits)
    if coded is None:
        return None
    x = (
        weight.factor
        if coded.order is None
        else tape.op("Gather", [weight.factor, coded.order], {"axis": -1})
    )
    if batch or written.dense or (written.kept and not coded.for_products):
        whole = _dequantized(written, tape, coded, None, written.numbers(*weight.rows.shape[:-1]))
        axes = [*range(len(batch)), len(batch) + 1, len(batch)]
        out = tape.op("MatMul", [x, tape.op("Transpose", [whole], {"perm": axes})])
    else:
        out = _product_of_codes(written, tape, x, coded)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return out if bias is None else tape.op("Add", [out, bias])


def _product_of_codes(written: _Written, tape: Any, x: Any, coded: _Coded) -> Any:
    attributes = {
        "K": coded.shape[2],
        "N": coded.shape[0],
        "bits": coded.bits,
        "block_size": coded.block,
        "accuracy_level": _EXACT if written.kept else _ACCURACY_LEVEL,
    }
    written.model.opset_imports[_CONTRIB] = 1
    inputs = [x, coded.codes, coded.scales, *([] if coded.zeros is None else [coded.zeros])]
    out = tape.op("MatMulNBits", inputs, attributes, domain=_CONTRIB)
    if coded.offsets is None:
        return out
    # what a block's offset adds is the same for all its weights: the sum of its inputs times the offset
    turned, last = tape.op("Transpose", [coded.offsets], {"perm": [1, 0]}), written.numbers(-1)
    # ONNX Runtime's optimizer moves transpositions wrongly past a reshape to one block
    if coded.shape[1] == 1:
        return tape.op("Add", [out, tape.op("Mul", [_summed(written, tape, x, coded.shape[2]), turned])])
    sizes = tape.op("Shape", [x], {"end": -1})
    shape = tape.op("Concat", [sizes, written.numbers(coded.shape[1], coded.block)], {"axis": 0})
    parts = _summed(written, tape, tape.op("Reshape", [x, shape]), coded.block)
    sums = tape.op("Squeeze", [parts, last])
    return tape.op("Add", [out, tape.op("MatMul", [sums, turned])])


def _summed(written: _Written, tape: Any, x: Any, length: int) -> Any:
    """The sum over the last axis of `x`, of this length; the axis stays.

    As a product where `x` may be empty, as an encoder's states are once their keys are in the cache: ONNX
    Runtime 1.31 gives sums of nothing the shape of what was to be summed.
    """
    if any(port.name == "encoder_hidden_states" for port in written.model.graph.inputs):
        ones = written.initializer(f"ones_{length}", np.ones((length, 1), np.float32))
        return tape.op("MatMul", [x, ones])
    return tape.op("ReduceSum", [x, written.numbers(-1)])


def _embedding(written: _Written, tape: Any, node: Any) -> Any:
    """Rows of the table of tokens.

    By plain operators: the WebAssembly build that transformers.js loads by itself has no kernel for
    ``GatherBlockQuantized``.
    """
    weight = table_of(node)
    if weight is None:
        return None
    coded, ids = written.code(weight, bits=8), node.inputs[1]
    # columns that are in another order would have to be brought back, and no embedding is stored so
    if coded is None or coded.order is not None:
        return None
    return _dequantized(written, tape, coded, ids, tape.op("Shape", [ids]))


def _dequantized(written: _Written, tape: Any, coded: _Coded, ids: Any | None, leading: Any) -> Any:
    """The rows `ids` of a weight in float32, or all of them; their shape is `leading`, and the columns."""
    _, blocks, columns = coded.shape

    def rows(value: Any) -> Any:
        return value if ids is None else tape.op("Gather", [value, ids])

    def joined(value: Any, width: int, wanted: int) -> Any:
        """What is behind the leading axes as one axis of `width`, and the first `wanted` of it."""
        shape = tape.op("Concat", [leading, written.numbers(width)], {"axis": 0})
        flat = tape.op("Reshape", [value, shape])
        ends = [written.numbers(end) for end in (0, wanted, -1)]
        return flat if width == wanted else tape.op("Slice", [flat, *ends])

    def spread(value: Any) -> Any:
        """One number a block on the axes of its codes."""
        return spread_flat(rows(value))

    def spread_flat(value: Any) -> Any:
        axes = written.numbers(*([-1] if coded.bits == 8 else [-2, -1]))
        return tape.op("Unsqueeze", [value, axes])

    def unpacked(packed: Any) -> Any:
        """In float32; of 4-bit codes both halves of a byte, on an axis of their own."""
        wide = tape.op("Cast", [rows(packed)], {"to": _FLOAT})
        return wide if coded.bits == 8 else _halves(written, tape, wide)

    if coded.zeros is None:
        zero = written.initializer(f"middle_{coded.bits}", np.array(2 ** (coded.bits - 1), np.float32))
    else:
        each = 2 if coded.bits == 4 else 1
        zero = spread_flat(joined(unpacked(coded.zeros), coded.zeros.const_value.shape[1] * each, blocks))
    products = tape.op("Mul", [tape.op("Sub", [unpacked(coded.codes), zero]), spread(coded.scales)])
    if coded.offsets is not None:
        products = tape.op("Add", [products, spread(coded.offsets)])
    return joined(products, blocks * coded.block, columns)


def _halves(written: _Written, tape: Any, packed: Any) -> Any:
    """Two codes of 4 bits from each byte, on an axis of their own: the lower half, and the upper."""
    sixteen = written.initializer("sixteen", np.array(16, np.float32))
    upper = tape.op("Floor", [tape.op("Div", [packed, sixteen])])
    lower = tape.op("Sub", [packed, tape.op("Mul", [upper, sixteen])])
    both = [tape.op("Unsqueeze", [part, written.numbers(-1)]) for part in (lower, upper)]
    return tape.op("Concat", both, {"axis": -1})


def _convolution(written: _Written, tape: Any, node: Any) -> Any:
    """A convolution in float32 whose weight is held in 8 bits.

    ``ConvInteger`` is no faster, and rounds activations too.
    """
    x, weight, *bias = node.inputs
    if written.kept or weight.name in written.left:
        return None
    array = constant(weight)
    if array is None or not is_weight(array):
        return None
    matrix = array.reshape(len(array), -1)
    codes = encode(matrix, 8, block=matrix.shape[1])
    parts = (codes.packed.reshape(array.shape), codes.scales[:, 0], np.full(len(array), 128, np.uint8))
    names = (f"{weight.name}{end}" for end in ("_quantized", "_scale", "_zero_point"))
    held = [written.initializer(name, part) for name, part in zip(names, parts, strict=True)]
    widened = tape.op("DequantizeLinear", held, {"axis": 0})
    return tape.op("Conv", [x, widened, *bias], dict(node.attributes))


_READERS = {"MatMul": _matmul, "Gemm": _matmul, "Gather": _embedding, "Conv": _convolution}


def _replace(node: Any, nodes: Sequence[Any], out: Any) -> None:
    """Put `nodes`, whose result is `out`, in the place of `node`; its output keeps name, type and shape."""
    old = node.outputs[0]
    for i, new in enumerate(nodes):
        new.name = f"{node.name or old.name}_{new.op_type}_{i}"
        for k, value in enumerate(new.outputs):
            value.name = f"{old.name}_{new.op_type}_{i}_{k}"
    graph = node.graph
    graph.insert_before(node, nodes)
    out.type, out.shape = old.type, old.shape
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    out.name, old.name = old.name, None
