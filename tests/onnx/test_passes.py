"""Passes say whether they changed a model, and a refusal comes through the chain as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from ia3_export.errors import Unsupported
from ia3_export.onnx.float16 import to_float16
from ia3_export.onnx.passes import run_passes
from ia3_export.onnx.quantize import quantize

pytestmark = [pytest.mark.filterwarnings("ignore")]


def _model(width: int) -> Any:
    """``x @ weight`` with a square weight of this width."""
    import onnx_ir as ir

    weight = ir.tensor(np.eye(width, dtype=np.float32), name="weight")
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", width]), type=kind)
    value = ir.Value(name="weight", const_value=weight, shape=weight.shape, type=kind)
    product = ir.node("MatMul", [x, value])
    out = product.outputs[0]
    out.name, out.shape, out.type = "y", ir.Shape(["batch", width]), kind
    graph = ir.Graph([x], [out], nodes=[product], initializers=[value], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("change", [to_float16, partial(quantize, bits=8)], ids=["fp16", "int8"])
def test_a_chain_has_changed_a_model_where_one_of_its_passes_has(change: Any) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    assert not run_passes(_model(64), RemoveUnusedNodesPass())
    assert run_passes(_model(64), change, RemoveUnusedNodesPass())
    # a weight of 256 bytes is none to quantize
    assert run_passes(_model(8), change) == (change is to_float16)


def test_a_refusal_comes_through_as_it_is() -> None:
    import onnx_ir as ir

    model = _model(64)
    model.graph.opset_imports["nobody"] = 1
    unheard = ir.node("Unheard", [model.graph.outputs[0]], domain="nobody")
    unheard.outputs[0].name = "z"
    model.graph.append(unheard)
    with pytest.raises(Unsupported, match="Unheard"):
        run_passes(model, to_float16)
