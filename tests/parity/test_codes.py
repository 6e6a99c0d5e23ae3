"""Codes beside weights: what ONNX Runtime's quantizers write is within a step, a code that is off by two is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.parity.codes import code_errors, within_a_step
from ia3_export.parity.expected import Expected
from ia3_export.parity.graph import read_graphs

pytestmark = pytest.mark.filterwarnings("ignore")


def _write(folder: Path, shape: tuple[int, int]) -> dict[str, Expected]:
    """A Linear's weight (out, in) in a checkpoint, and a graph that multiplies by its transpose under the same name."""
    weight = np.random.default_rng(0).normal(size=shape).astype("<f4")
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    stored = read_checkpoint(folder / "model.safetensors").tensors["layer.weight"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "layer.weight")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "model.onnx")
    return {"layer.weight": Expected("layer.weight", "F32", stored, (), None, stored)}


def _quantize(folder: Path, how: str) -> Path:
    target = folder / "quantized.onnx"
    if how.startswith("int8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        kind = QuantType.QUInt8 if "unsigned" in how else QuantType.QInt8
        quantize_dynamic(folder / "model.onnx", target, weight_type=kind, per_channel="channel" in how)
        return target
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(folder / "model.onnx"), block_size=32, is_symmetric="symmetric" in how
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))
    return target


def _errors(rows: dict[str, Expected], path: Path) -> list[tuple[str, str, float]]:
    return list(code_errors(rows, read_graphs([path]).initializers))


@pytest.mark.parametrize("shape", [(48, 64), (64, 64), (32, 80)], ids=str)
@pytest.mark.parametrize("how", ["int8", "int8 unsigned", "int8 channel", "int4", "int4 symmetric"])
def test_onnx_runtimes_codes_are_within_a_step_and_a_wrong_one_is_not(
    tmp_path: Path, how: str, shape: tuple[int, int]
) -> None:
    rows = _write(tmp_path, shape)
    path = _quantize(tmp_path, how)
    ((name, tensor, error),) = _errors(rows, path)
    assert tensor == "layer.weight"
    assert within_a_step(error), error
    model = onnx.load(path)
    codes: Any = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(codes).copy()
    flat = values.reshape(-1)
    # two steps towards the middle; in int4 of the low nibble
    low = flat[5] & 0x0F if how.startswith("int4") else flat[5]
    middle = 8 if how.startswith("int4") else 128 if flat.dtype == np.uint8 else 0
    flat[5] = flat[5] - 2 if low > middle else flat[5] + 2
    codes.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)
    ((_, _, error),) = _errors(rows, path)
    assert not within_a_step(error), error


def test_codes_of_other_weights_are_far_away(tmp_path: Path) -> None:
    rows = _write(tmp_path, (48, 64))
    path = _quantize(tmp_path, "int8 channel")
    other = np.random.default_rng(1).normal(size=(48, 64)).astype("<f4")
    save_file({"layer.weight": other}, tmp_path / "model.safetensors")
    assert not within_a_step(_errors(rows, path)[0][2])
