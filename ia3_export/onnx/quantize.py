"""Weights of 8 and 4 bits: the operators of ONNX Runtime's own quantizers, placed weight by weight.

``onnxruntime.quantization`` makes the same nodes, but leaves out what our graphs are full of (``Gemm``,
weights that reach a ``MatMul`` through a ``Transpose`` or a ``Split``, tied heads), holds all weights in
memory three times over, and gives a whole embedding one scale. So its kernel and its formats are used here,
and its walk over the graph is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ia3_export.fold import Array

#: Weights in int4 that share a scale and a zero point.
BLOCK = 32
#: A weight has more bytes than this, and two axes longer than 1 (biases and norms have one).
SMALL = 1024
#: ``MatMulNBits`` may compute in 8 bits: decodes 2.3 times as fast as in float32 on a CPU, and is as near.
_ACCURACY_LEVEL = 4
_CONTRIB = "com.microsoft"
_FLOAT = 1  # onnx.TensorProto.FLOAT
_ZERO = 128
#: What may lie between a weight, or the ids of tokens, and their reader.
SHAPING = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def quantize(model: Any, *, precision: Literal["int8", "int4"]) -> Any:
    """The pass that replaces the weights of an ``onnx_ir.Model`` by codes, in the bodies of ``If`` too.

    In ``int8`` a weight has one scale for each output feature, token or channel:

    - ``MatMul`` and ``Gemm`` become ``MatMulInteger``, and activations are quantized as they come;
    - ``Gather`` of the token embedding takes codes and scales;
    - a ``Conv`` computes in float32 after ``DequantizeLinear``.

    In ``int4`` a scale and a zero point belong to 32 weights, and activations stay float32 (``MatMulNBits``);
    the token embedding has 8 bits.

    In ``int8`` a tied embedding stays tied: lookup and head read the same codes. Tables of positions stay
    float32: they are small, and all layers see their error.
    """
    import onnx_ir

    written = _Written(model, precision == "int4")
    changed = False
    for node in list(model.graph.all_nodes()):
        if node.op_type in _READERS and not node.domain:
            tape = onnx_ir.tape.Tape()
            out = _READERS[node.op_type](written, tape, node)
            if out is not None:
                _replace(node, tape.nodes, out)
                changed = True
    return onnx_ir.passes.PassResult(model, changed)


def eight_bits(array: Array, axis: int) -> tuple[Array, Array]:
    """Codes (uint8, 128 is zero) and scales of `array`; those along `axis` share a scale.

    Unsigned, since ONNX Runtime saturates sums of products of uint8 activations and int8 weights on x86
    processors without VNNI: the same file would give other numbers there.
    """
    largest = np.maximum(array.max(axis=axis, keepdims=True), -array.min(axis=axis, keepdims=True))
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(127))
    codes = array / scale
    np.rint(codes, out=codes)
    codes += _ZERO
    return codes.astype(np.uint8), scale.reshape(-1) if array.ndim == 2 else scale


def four_bits(array: Array, axis: int) -> tuple[Array, ...]:
    """Codes, scales, zero points of the matrix `array`, inputs along `axis`, as ``MatMulNBits`` takes them.

    By ONNX Runtime's own kernel: blocks of 32 from least to largest value. An odd number of blocks is
    symmetric and has no zero points: ``GatherBlockQuantized`` reads them from the wrong places then (ONNX
    Runtime before 1.27).
    """
    handlers, level = logging.root.handlers[:], logging.root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    logging.root.handlers[:], logging.root.level = handlers, level  # importing it configures logging
    columns = np.ascontiguousarray(np.moveaxis(array, axis, 0))
    symmetric = -(-len(columns) // BLOCK) % 2 == 1
    config = tool.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=symmetric)
    codes, *rest = tool.DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
    scales, zeros = (part.reshape(len(codes), -1) for part in rest)  # flat in earlier versions
    return (codes, scales) if symmetric else (codes, scales, zeros)


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


@dataclass(frozen=True, slots=True)
class _Written:
    """What is there already and used again: codes of weights, and quantized activations of each graph."""

    model: Any
    int4: bool
    codes: dict[tuple[Any, int, int], tuple[Any, ...]] = field(default_factory=dict)
    activations: dict[tuple[Any, Any], tuple[Any, ...]] = field(default_factory=dict)

    def coded(self, weight: Any, array: Array, axis: int, bits: int) -> tuple[Any, ...]:
        """Codes, scales and, with 4 `bits`, zero points of `weight`, which holds `array`; its inputs lie
        along `axis`.
        """
        key = (weight, axis, bits)
        if key not in self.codes:
            suffixes = ("_Q4", "_scales", "_zero_points") if bits == 4 else ("_quantized", "_scale")
            parts = four_bits(array, axis) if bits == 4 else eight_bits(array, axis)
            named = zip(suffixes, parts, strict=False)  # not all have zero points
            self.codes[key] = tuple(self.initializer(f"{weight.name}{end}", part) for end, part in named)
        return self.codes[key]

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


def _matmul(written: _Written, tape: Any, node: Any) -> Any:
    """``x @ weight``, for ``Gemm`` with its bias."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA") or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
        return None
    x, weight, *bias = node.inputs
    array = constant(weight)
    if array is None or not is_weight(array) or (written.int4 and array.ndim != 2):
        return None
    axis = -1 if options.get("transB") else -2
    maker = weight.producer()
    if maker is not None and maker.op_type == "Transpose" and array.ndim == 2 and axis == -2:
        # a head that is tied to the embedding: its codes are those of the lookup
        weight, array, axis = maker.inputs[0], array.T, -1
    coded = written.coded(weight, array, axis, 4 if written.int4 else 8)
    if written.int4:
        out = _four_bit_product(written, tape, x, coded, np.moveaxis(array, axis, 0).shape)
    else:
        out = _eight_bit_product(written, tape, node.graph, x, coded, turned=axis == -1)
    return tape.op("Add", [out, bias[0]]) if bias and bias[0] is not None else out


def _four_bit_product(
    written: _Written, tape: Any, x: Any, coded: Sequence[Any], shape: tuple[int, ...]
) -> Any:
    inputs, outputs = shape
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": 4,
        "block_size": BLOCK,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    written.model.opset_imports[_CONTRIB] = 1
    return tape.op("MatMulNBits", [x, *coded], attributes, domain=_CONTRIB)


def _eight_bit_product(
    written: _Written, tape: Any, graph: Any, x: Any, coded: Sequence[Any], *, turned: bool
) -> Any:
    """Integers, times the scales of both sides: the chain of nodes that ONNX Runtime fuses into one."""
    codes, scale = coded
    if turned:
        codes = tape.op("Transpose", [codes], {"perm": [1, 0]})
    if (x, graph) not in written.activations:
        written.activations[x, graph] = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
    quantized, x_scale, x_zero = written.activations[x, graph]
    zero = written.initializer("weight_zero_point", np.array(_ZERO, np.uint8))
    sums = tape.op("Cast", [tape.op("MatMulInteger", [quantized, codes, x_zero, zero])], {"to": _FLOAT})
    return tape.op("Mul", [sums, tape.op("Mul", [x_scale, scale])])


def _embedding(written: _Written, tape: Any, node: Any) -> Any:
    """Rows of the table of tokens, in 8 bits whatever the precision.

    The WebAssembly build that transformers.js loads by itself has no kernel for rows of 4 bits
    (``GatherBlockQuantized``), and plain operators run everywhere.
    """
    table, ids = node.inputs
    along = node.attributes.get("axis")
    array = constant(table)
    if (
        array is None
        or array.ndim != 2
        or not is_weight(array)
        or (along and along.value)
        or not _are_tokens(ids)
    ):
        return None
    codes, scale = written.coded(table, array, -1, 8)
    zero = written.initializer("embedding_zero_point", np.array(_ZERO, np.float32))
    last = written.initializer("embedding_axis", np.array([-1]))
    rows = tape.op("Sub", [tape.op("Cast", [tape.op("Gather", [codes, ids])], {"to": _FLOAT}), zero])
    return tape.op("Mul", [rows, tape.op("Unsqueeze", [tape.op("Gather", [scale, ids]), last])])


def _convolution(written: _Written, tape: Any, node: Any) -> Any:
    """A convolution in float32 whose weight is held in 8 bits.

    ``ConvInteger`` is no faster, and rounds activations too.
    """
    x, weight, *bias = node.inputs
    array = constant(weight)
    if written.int4 or array is None or not is_weight(array):
        return None
    codes, scale = eight_bits(array.reshape(len(array), -1), -1)
    parts = (codes.reshape(array.shape), scale, np.full(len(array), _ZERO, np.uint8))
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
