"""Weights of 16 bits that were widened for the trace, in 16 bits again: where that is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from ia3_export.fold import Array
from ia3_export.onnx.weights import is_weight

_FLOAT = 1  # onnx.TensorProto.FLOAT


def narrow(model: Any) -> Any:
    """The pass that holds float32 weights of an ``onnx_ir.Model`` as float16 or bfloat16, whichever has all
    of their values, and casts them where they are read. ONNX Runtime does that once, when a session is
    made."""
    import onnx_ir

    changed = False
    for graph in (model.graph, *model.graph.subgraphs()):
        casts = []
        for name, value in list(graph.initializers.items()):
            held = value.const_value
            if held is None or held.dtype.name != "FLOAT" or not is_weight(held):
                continue
            tensor = _narrowed(held.numpy(), name)
            if tensor is None:
                continue
            cast = onnx_ir.node("Cast", [None], {"to": _FLOAT}, name=f"{name}_cast")
            cast.outputs[0].name = f"{name}_float32"
            value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            del graph.initializers[name]
            stored = onnx_ir.Value(name=name, const_value=tensor)
            graph.register_initializer(stored)
            cast.replace_input_with(0, stored)
            casts.append(cast)
        if casts:
            graph.insert_before(graph[0], casts)
            changed = True
    return onnx_ir.passes.PassResult(model, changed)


def _narrowed(array: Array, name: str) -> Any | None:
    import onnx_ir

    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.array_equal(half, array):
        return onnx_ir.tensor(half, name=name)
    bits = np.ascontiguousarray(array).view("<u4")
    if (bits & 0xFFFF).any():
        return None
    return onnx_ir.Tensor((bits >> 16).astype("<u2"), dtype=onnx_ir.DataType.BFLOAT16, name=name)
