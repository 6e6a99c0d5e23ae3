"""Weights of 8 and 4 bits in blocks: the operators that ONNX Runtime computes with, placed weight by weight.

``onnxruntime.quantization`` makes the same nodes, but leaves out what our graphs are full of (``Gemm``,
weights that reach a ``MatMul`` through a ``Transpose`` or a ``Split``, tied heads) and holds all weights in
memory three times over. So its formats are used here, and its walk over the graph is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.blocks import BLOCK, Codes, encode

#: A weight has more bytes than this, and two axes longer than 1 (biases and norms have one).
SMALL = 1024
#: Activations are rounded to 8 bits, a scale for each block: decodes several times as fast as in float32.
_ACCURACY_LEVEL = 4
_CONTRIB = "com.microsoft"
_FLOAT = 1  # onnx.TensorProto.FLOAT
#: What may lie between a weight, or the ids of tokens, and their reader.
SHAPING = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def quantize(
    model: Any, *, bits: int, dense: bool = False, given: Mapping[str, Codes] = MappingProxyType({})
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
    """
    import onnx_ir

    written = _Written(model=model, bits=bits, dense=dense, given=given)
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


def constant(value: Any) -> Array | None:
    """What `value` always holds: a weight, possibly transposed, cut or reshaped on its way.

    None if it depends on inputs.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx_ir import to_proto

    array: Array
    if value.const_value is not None:
        array = value.const_value.numpy()
        return array
    node = value.producer()
    if node is None or node.op_type not in SHAPING:
        return None
    given = {v.name: constant(v) for v in node.inputs if v is not None}
    if any(known is None for known in given.values()):
        return None
    (array,) = ReferenceEvaluator(to_proto(node)).run([value.name], given)
    return array


def is_weight(array: Any) -> bool:
    """Whether an array (or tensor) is a weight: more than 1 KB, and two axes longer than 1."""
    return array.nbytes > SMALL and sum(int(size) > 1 for size in array.shape) > 1


@dataclass(frozen=True, slots=True, eq=False)
class _Coded:
    """A weight in the graph: values of codes and scales, of offsets or None, with so many bits each, and the
    shape (rows, blocks, columns) that they stand for."""

    codes: Any
    scales: Any
    offsets: Any | None
    bits: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What is there already and used again: codes of weights, and casts of their scales."""

    model: Any
    bits: int
    dense: bool
    given: Mapping[str, Codes]
    coded: dict[tuple[Any, bool], _Coded] = field(default_factory=dict)
    casts: list[Any] = field(default_factory=list)

    def code(self, weight: Weight, *, bits: int) -> _Coded:
        """Its codes, made with `bits` bits if they are not there or `given`."""
        key = (weight.value, weight.turned)
        if key not in self.coded:
            name, matrix = weight.value.name, weight.rows.reshape(-1, weight.rows.shape[-1])
            # offsets need whole blocks
            made = self.given.get(name) or encode(matrix, bits if matrix.shape[1] % BLOCK == 0 else 8)
            codes = self.initializer(f"{name}_Q{made.bits}", made.packed)
            offsets = None if made.offsets is None else self._halved(f"{name}_offsets", made.offsets)
            scales = self._scales(f"{name}_scales", made.scales)
            shape = (*made.scales.shape, matrix.shape[1])
            self.coded[key] = _Coded(codes, scales, offsets, made.bits, shape)
        return self.coded[key]

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

    def _scales(self, name: str, scales: Array) -> Any:
        """`scales` in float32, of `dense` weights stored as float16.

        ``MatMulNBits`` wants constants: in a session without optimizations, which leaves the cast where it
        is, it would give wrong numbers on x86, silently.
        """
        return self._halved(name, scales) if self.dense else self.initializer(name, scales)

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


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """What a node reads as a weight, a value of ``onnx_ir``.

    Attributes:
        value: it, or of a transposed one (a head that is tied to the embedding) what it is the transpose of.
        rows: its numbers, outputs x inputs, or tokens x columns; batches of matrices have more axes in front.
        turned: whether `value` holds the transpose of `rows`.
        factor: what a product multiplies it with; None for a table.
    """

    value: Any
    rows: Array
    turned: bool
    factor: Any | None


def find_weights(model: Any) -> Iterator[Weight]:
    """The weights that `quantize` holds as codes, except those of convolutions, in the order of their
    nodes."""
    for node in model.graph.all_nodes():
        read = {"MatMul": _factor, "Gemm": _factor, "Gather": _table}.get(node.op_type)
        weight = None if read is None or node.domain else read(node)
        if weight is not None:
            yield weight


def _factor(node: Any) -> Weight | None:
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA") or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
        return None
    factor, value = node.inputs[:2]
    array = constant(value)
    if array is None or not is_weight(array):
        return None
    turned = not options.get("transB")
    rows = np.swapaxes(array, -1, -2) if turned else array
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and turned and array.ndim == 2:
        value, turned = maker.inputs[0], False
    return Weight(value, rows, turned, factor)


def _table(node: Any) -> Weight | None:
    value, ids = node.inputs
    along = node.attributes.get("axis")
    if (along and along.value) or not _are_tokens(ids):
        return None
    array = constant(value)
    if array is None or array.ndim != 2 or not is_weight(array):
        return None
    return Weight(value, array, False, None)


def _matmul(written: _Written, tape: Any, node: Any) -> Any:
    """``x @ weight``, for ``Gemm`` with its bias."""
    weight = _factor(node)
    if weight is None:
        return None
    batch = weight.rows.shape[:-2]
    coded = written.code(weight, bits=8 if batch else written.bits)
    if batch or written.dense:
        whole = _dequantized(written, tape, coded, None, written.numbers(*weight.rows.shape[:-1]))
        axes = [*range(len(batch)), len(batch) + 1, len(batch)]
        out = tape.op("MatMul", [weight.factor, tape.op("Transpose", [whole], {"perm": axes})])
    else:
        out = _product_of_codes(written, tape, weight.factor, coded)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return out if bias is None else tape.op("Add", [out, bias])


def _product_of_codes(written: _Written, tape: Any, x: Any, coded: _Coded) -> Any:
    attributes = {
        "K": coded.shape[2],
        "N": coded.shape[0],
        "bits": coded.bits,
        "block_size": BLOCK,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    written.model.opset_imports[_CONTRIB] = 1
    out = tape.op("MatMulNBits", [x, coded.codes, coded.scales], attributes, domain=_CONTRIB)
    if coded.offsets is None:
        return out
    # what a block's offset adds is the same for all its weights: the sum of its inputs times the offset
    turned, last = tape.op("Transpose", [coded.offsets], {"perm": [1, 0]}), written.numbers(-1)
    # ONNX Runtime's optimizer moves transpositions wrongly past a reshape to one block
    if coded.shape[1] == 1:
        return tape.op("Add", [out, tape.op("Mul", [tape.op("ReduceSum", [x, last]), turned])])
    sizes = tape.op("Shape", [x], {"end": -1})
    shape = tape.op("Concat", [sizes, written.numbers(coded.shape[1], BLOCK)], {"axis": 0})
    sums = tape.op("ReduceSum", [tape.op("Reshape", [x, shape]), last], {"keepdims": 0})
    return tape.op("Add", [out, tape.op("MatMul", [sums, turned])])


def _embedding(written: _Written, tape: Any, node: Any) -> Any:
    """Rows of the table of tokens.

    By plain operators: the WebAssembly build that transformers.js loads by itself has no kernel for
    ``GatherBlockQuantized``.
    """
    weight = _table(node)
    if weight is None:
        return None
    ids = node.inputs[1]
    return _dequantized(written, tape, written.code(weight, bits=8), ids, tape.op("Shape", [ids]))


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
        axes = written.numbers(*([-1] if coded.bits == 8 else [-2, -1]))
        return tape.op("Unsqueeze", [rows(value), axes])

    values = tape.op("Cast", [rows(coded.codes)], {"to": _FLOAT})
    if coded.bits == 4:
        values = _halves(written, tape, values)
    middle = written.initializer(f"middle_{coded.bits}", np.array(2 ** (coded.bits - 1), np.float32))
    products = tape.op("Mul", [tape.op("Sub", [values, middle]), spread(coded.scales)])
    if coded.offsets is not None:
        products = tape.op("Add", [products, spread(coded.offsets)])
    return joined(products, blocks * BLOCK, columns)


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


def _are_tokens(ids: Any) -> bool:
    """Whether `ids` are the graph's input_ids, perhaps in another shape."""
    while ids.producer() is not None and ids.producer().op_type in SHAPING:
        ids = ids.producer().inputs[0]
    return bool(ids.is_graph_input() and ids.name == "input_ids")


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
