"""float16 where float16 suffices: a graph whose matrices are halved, and whose positions, masks and norms are
not.

``onnxruntime.transformers.float16`` halves every node. But positions above 2048 have no float16, squares in a
norm overflow beyond 255, and its casts around operators that stay float32 land outside of the bodies of
``If``. transformers computes positions and norms in float32 for that reason; a trace of a float32 model has
lost these casts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.onnx.weights import SMALL, looks_up_task

#: What a mask's minimum becomes. exp(-30000) is 0, and mask plus score stays above float16's least number
#: (-65504), so that a row with nothing to attend to has a finite softmax.
_MASKED = -30000.0
_REDUCTIONS = ("ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")
_SQUARES = ("Mul", "Pow")
_SCALINGS = ("Div", "Mul")


def to_float16(model: Any) -> Any:
    """The pass that makes an ``onnx_ir.Model`` of float32 compute in float16. float32 remain

    - inputs and outputs, the cache too: the file stands in for the float32 one, and nothing is to be
      configured. transformers.js before 4 and ONNX Runtime's examples make an empty float32 cache, images and
      sound come as float32, and JavaScript often has no float16 numbers. What leaves was float16 before, so a
      cache loses nothing on its way round;
    - what follows from positions and masks alone: rotary angles, buckets of distances, ALiBi;
    - the statistics of norms and poolings, from the square to the division;
    - operators that ONNX Runtime has no float16 kernels for, by its own list.

    Raises `Unsupported` for graphs whose types onnx cannot infer.
    """
    from onnx_ir import DataType
    from onnx_ir.passes import PassResult
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

    ShapeInferencePass(strict_mode=False)(model)
    nodes = list(model.graph.all_nodes())
    _check_types(nodes)
    positions = set(_positional(model.graph, set()))
    exact = positions | _statistics(nodes) | {node for node in nodes if node.op_type in DEFAULT_OP_BLOCK_LIST}
    for node in nodes:
        if node not in exact:
            _narrow_outputs(node)
    for graph in model.graph.subgraphs():
        for value in graph.inputs:
            if value.dtype == DataType.FLOAT:
                value.dtype = DataType.FLOAT16
    casts = _Casts(model, exact, positions)
    for node in nodes:
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype in (DataType.FLOAT, DataType.FLOAT16):
                node.replace_input_with(i, casts.of(value, casts.wanted(node, i)))
    for graph in model.graph.subgraphs():
        for i, value in enumerate(graph.outputs):
            if value.dtype == DataType.FLOAT:
                graph.outputs[i] = casts.of(value, DataType.FLOAT16)
    _widen_outputs(model.graph)
    for value in (v for node in model.graph.all_nodes() for v in node.outputs if not v.is_graph_output()):
        value.type = value.shape = None  # ONNX Runtime infers them itself
    return PassResult(model, modified=exact != set(nodes))


def halved(array: Array) -> Array:
    """`array` in float16; finite numbers stay finite, and those below its range are taken for masks."""
    with np.errstate(over="ignore"):
        half: Array = array.astype(np.float16)
    lost = np.isinf(half) & np.isfinite(array)
    half[lost & (array < 0)] = _MASKED
    half[lost & (array > 0)] = np.finfo(np.float16).max
    return half


def _check_types(nodes: list[Any]) -> None:
    for node in nodes:
        for value in node.outputs:
            if value.name and value.dtype is None:
                raise Unsupported(
                    f"onnx cannot infer the type of {value.name}, which {node.op_type} gives",
                    hint="leave out --precision fp16, and please report the architecture",
                )


def _positional(graph: Any, active: set[Any]) -> Iterator[Any]:
    """Nodes that no weight and no float input reaches, so that they know positions, masks and sizes only.

    `active` collects the values that one of them does reach.
    """
    from onnx_ir import DataType

    active |= {value for value in graph.inputs if value.dtype == DataType.FLOAT}
    active |= {
        v for v in graph.initializers.values() if v.dtype == DataType.FLOAT and v.const_value.nbytes > SMALL
    }
    for node in graph:
        bodies = [
            attribute.as_graph() for attribute in node.attributes.values() if attribute.type.name == "GRAPH"
        ]
        for body in bodies:
            yield from _positional(body, active)
        if bodies or not active.isdisjoint(node.inputs) or looks_up_task(node):  # small tables, too
            active |= {value for value in node.outputs if value.dtype == DataType.FLOAT}
        else:
            yield node


def _statistics(nodes: list[Any]) -> set[Any]:
    """Reductions with the squares before them and, after them, all up to the division of what was reduced."""
    from onnx_ir import DataType

    found: set[Any] = set()
    for node in nodes:
        if node.op_type not in _REDUCTIONS or node.inputs[0].dtype != DataType.FLOAT:
            continue
        square = node.inputs[0].producer()
        found |= {node, square} if square is not None and square.op_type in _SQUARES else {node}
        waiting = [node]
        while waiting:
            for reader in {reader: None for value in waiting.pop().outputs for reader, _ in value.uses()}:
                others = [
                    v
                    for v in reader.inputs
                    if v is not None and v.dtype == DataType.FLOAT and not _is_scalar(v)
                ]
                if reader not in found and all(v.producer() in found for v in others):
                    found.add(reader)
                    waiting.append(reader)
                elif reader.op_type in _SCALINGS:
                    found.add(reader)
    return found


def _is_scalar(value: Any) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def _narrow_outputs(node: Any) -> None:
    from onnx_ir import AttrInt64, DataType

    for value in node.outputs:
        if value.dtype == DataType.FLOAT:
            value.dtype = DataType.FLOAT16
            if node.op_type == "Cast":
                node.attributes["to"] = AttrInt64("to", int(DataType.FLOAT16))


@dataclass(frozen=True, slots=True)
class _Casts:
    """The casts between float32 and float16, one for each value."""

    model: Any
    exact: set[Any]
    positions: set[Any]
    made: dict[tuple[Any, Any], Any] = field(default_factory=dict)

    def wanted(self, node: Any, i: int) -> Any:
        """The type in which `node` reads its input `i`."""
        from onnx_ir import DataType
        from onnxruntime.transformers.float16 import ALWAYS_FLOAT_INPUTS

        fixed = i in ALWAYS_FLOAT_INPUTS.get(node.op_type, ())
        return DataType.FLOAT if fixed or node in self.exact else DataType.FLOAT16

    def of(self, value: Any, dtype: Any) -> Any:
        """`value` in `dtype`; a cast stands where the value is made, for bodies of ``If`` to see it."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.made:
            made = self._initializer if value.const_value is not None else self._cast
            self.made[value, dtype] = made(value, dtype)
        return self.made[value, dtype]

    def _initializer(self, value: Any, dtype: Any) -> Any:
        """Halved under its own name, or beside itself if some node reads it in float32 as well."""
        import onnx_ir

        half = halved(value.const_value.numpy())
        if any(self.wanted(node, i) != dtype for node, i in value.uses()):
            name = f"{value.name}_float16"
            value, owner = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(half, name=name)), value.graph
            owner.register_initializer(value)
        else:
            value.const_value = onnx_ir.tensor(half, name=value.name)
        value.type, value.shape = onnx_ir.TensorType(dtype), value.const_value.shape
        return value

    def _cast(self, value: Any, dtype: Any) -> Any:
        import onnx_ir

        tape = onnx_ir.tape.Tape()
        source = value
        if value.producer() in self.positions:  # masks: float32's least number is no float16
            source = tape.op("Clip", [value, self._floor()])
            source.name = f"{value.name}_clipped"
        cast = tape.op("Cast", [source], {"to": int(dtype)})
        cast.name, cast.dtype = f"{value.name}_{dtype.name.lower()}", dtype
        for node in tape.nodes:
            node.name = node.outputs[0].name
        if value.producer() is not None:
            value.producer().graph.insert_after(value.producer(), tape.nodes)
        else:
            value.graph.insert_before(value.graph[0], tape.nodes)
        return cast

    def _floor(self) -> Any:
        import onnx_ir

        there = self.model.graph.initializers
        if "float16_floor" not in there:
            tensor = onnx_ir.tensor(np.array(_MASKED, np.float32), name="float16_floor")
            self.model.graph.register_initializer(onnx_ir.Value(name=tensor.name, const_value=tensor))
        return there["float16_floor"]


def _widen_outputs(graph: Any) -> None:
    """Cast the outputs to float32; the names of the outputs are those of the casts."""
    import onnx_ir

    for i, value in enumerate(graph.outputs):
        if value.dtype != onnx_ir.DataType.FLOAT16:
            continue
        tape = onnx_ir.tape.Tape()
        cast = tape.op("Cast", [value], {"to": int(onnx_ir.DataType.FLOAT)})
        cast.shape, cast.dtype = value.shape, onnx_ir.DataType.FLOAT
        graph.outputs[i] = cast
        name = value.name
        value.name = f"{name}_float16"
        cast.name = tape.nodes[0].name = name
        graph.extend(tape.nodes)
