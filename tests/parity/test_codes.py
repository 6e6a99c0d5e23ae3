"""Codes beside weights: what ONNX Runtime's quantizers write is within a step, a code off by two is not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from ia3_export import plan_merge
from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.onnx.exported import file_name, find_onnx
from ia3_export.onnx.precision import convert_precision
from ia3_export.parity.bits.codes import CODES, CodeCheck, check_codes
from ia3_export.parity.bits.expected import Expected
from ia3_export.parity.bits.graph import prove_graph
from ia3_export.parity.bits.graph_files import Graph, read_graphs
from tests.e2e.command import run
from tests.support import zoo
from tests.support.exported import Exported, Exports

pytestmark = pytest.mark.filterwarnings("ignore")


def _write(folder: Path, shape: tuple[int, int]) -> dict[str, Expected]:
    """A Linear's weight (out, in) in a checkpoint, and a graph with its transpose under the same name."""
    weight = np.random.default_rng(0).normal(size=shape).astype("<f4")
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    stored = read_checkpoint(folder / "model.safetensors").tensors["layer.weight"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "layer.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "model.onnx")
    return {
        "layer.weight": Expected(
            name="layer.weight", dtype="F32", source=stored, scales=(), how=None, base=stored
        )
    }


def _quantize(folder: Path, how: str) -> Path:
    target = folder / "quantized.onnx"
    if how.startswith("int8") and "blocks" not in how:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        kind = QuantType.QUInt8 if "unsigned" in how else QuantType.QInt8
        quantize_dynamic(folder / "model.onnx", target, weight_type=kind, per_channel="channel" in how)
        return target
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    bits = int(how.removeprefix("int")[0])
    config = tool.DefaultWeightOnlyQuantConfig(block_size=32, bits=bits, is_symmetric="symmetric" in how)
    quantizer = tool.MatMulNBitsQuantizer(onnx.load(folder / "model.onnx"), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))
    return target


def _checks(rows: dict[str, Expected], path: Path) -> list[CodeCheck]:
    return list(check_codes(rows, read_graphs([path]).initializers, {}, lambda _: None))


@pytest.mark.parametrize("shape", [(48, 64), (64, 64), (32, 80)], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        "int8",
        "int8 unsigned",
        "int8 channel",
        "int8 blocks",
        "int8 blocks symmetric",
        "int4",
        "int4 symmetric",
    ],
)
def test_onnx_runtimes_codes_are_within_a_step_and_a_wrong_one_is_not(
    tmp_path: Path, how: str, shape: tuple[int, int]
) -> None:
    rows = _write(tmp_path, shape)
    path = _quantize(tmp_path, how)
    (check,) = _checks(rows, path)
    assert check.of == "layer.weight"
    assert check.within_a_step, check
    model = onnx.load(path)
    codes: Any = next(t for t in model.graph.initializer if t.name == check.name)
    values = numpy_helper.to_array(codes).copy()
    flat = values.reshape(-1)
    # two steps towards the middle; in int4 of the low nibble
    low = flat[5] & 0x0F if how.startswith("int4") else flat[5]
    middle = 8 if how.startswith("int4") else 128 if flat.dtype == np.uint8 else 0
    flat[5] = flat[5] - 2 if low > middle else flat[5] + 2
    codes.CopyFrom(numpy_helper.from_array(values, check.name))
    onnx.save(model, path)
    (check,) = _checks(rows, path)
    assert check.of == "layer.weight"
    assert not check.within_a_step, check


def test_codes_of_other_weights_are_far_away(tmp_path: Path) -> None:
    rows = _write(tmp_path, (48, 64))
    path = _quantize(tmp_path, "int8 channel")
    other = np.random.default_rng(1).normal(size=(48, 64)).astype("<f4")
    save_file({"layer.weight": other}, tmp_path / "model.safetensors")
    assert not _checks(rows, path)[0].within_a_step


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_codes_under_another_name_are_found_by_their_values_and_wrong_ones_by_none(
    tmp_path: Path, how: str
) -> None:
    rows = _write(tmp_path, (48, 64))
    path = _quantize(tmp_path, how)
    (check,) = _checks({"other.weight": replace(rows["layer.weight"], name="other.weight")}, path)
    assert (check.of, check.within_a_step) == ("other.weight", True)
    _write(tmp_path, (48, 64))
    save_file({"layer.weight": np.ones((48, 64), "<f4")}, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path / "model.safetensors").tensors["layer.weight"]
    ones = Expected(name="other.weight", dtype="F32", source=stored, scales=(), how=None, base=stored)
    (check,) = _checks({"other.weight": ones}, path)
    assert (check.of, check.within_a_step) == (None, False)


def _in_codes(exported: Exported, folder: Path) -> Path:
    """The exported folder with its graphs in int8 and int4, too: what ``--precision`` writes from one
    trace."""
    shutil.copytree(exported.folder, folder)
    for graph in exported.graphs:
        for precision in ("int8", "q8", "int4"):
            convert_precision(graph, folder / "onnx" / file_name(graph.stem, precision), precision)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "olmoe", "bert-masked-lm", "t5"])
def test_every_code_of_an_exported_folder_is_compared_whatever_transformers_renames(
    exports: Exports, kind: str, tmp_path: Path
) -> None:
    exported = exports(kind)
    plan = plan_merge(exported.base, [exported.adapter])
    folder = _in_codes(exported, tmp_path / "exported")
    graphs = [read_graphs(paths) for paths in find_onnx(folder)]
    plain = next(graph for graph in graphs if graph.precision == "float32")
    for graph in (g for g in graphs if g is not plain):
        proof = prove_graph(plan, graph, "onnx", float_graph=plain)
        assert (proof.findings, proof.unproven) == ((), 0)
        codes = [n for n, t in graph.initializers.items() if t.dtype.name in CODES and "zero_point" not in n]
        assert len(codes) > 5
        for changed in (codes, codes[:1]):
            damaged = {**graph.initializers, **{name: _with_one_changed(graph, name) for name in changed}}
            again = prove_graph(plan, replace(graph, initializers=damaged), "onnx", float_graph=plain)
            assert sorted(finding.tensor for finding in again.findings) == sorted(changed)


def _with_one_changed(graph: Graph, name: str) -> Any:
    """An initializer of codes, one of which is four steps (of 4 bits) or eight (of 8 bits) off."""
    tensor = graph.initializers[name]
    values = tensor.numpy().copy()
    flat = values.reshape(-1)
    at = len(flat) // 2  # the first row may be zeros, of a padding token
    flat[at] = flat[at] ^ (0x44 if name.endswith("_Q4") else 0x08)
    return onnx_ir.tensor(values, dtype=tensor.dtype, name=name)


@pytest.mark.slow
def test_verify_fails_on_a_changed_code_of_a_renamed_tensor_and_says_what_was_not_compared(
    exports: Exports, tmp_path: Path
) -> None:
    exported = exports("vit")
    _in_codes(exported, tmp_path / "exported")
    (tmp_path / "exported/onnx/model.onnx").unlink()
    for other in ("q4", "quantized"):
        (tmp_path / f"exported/onnx/model_{other}.onnx").unlink()
    path = tmp_path / "exported/onnx/model_int8.onnx"
    what = ("verify", "--base", exported.base, "--adapter", exported.adapter, "--onnx", tmp_path / "exported")
    ran = run(*what)
    assert ran.code == 0, ran.stdout + ran.stderr
    assert "initializers hold codes, which bits cannot prove; 13 of them were compared" in ran.stdout
    model = onnx.load(path)
    codes = next(t for t in model.graph.initializer if t.name.endswith("q_proj.weight_Q8"))
    values = numpy_helper.to_array(codes).copy()
    values.reshape(-1)[3] ^= 0x08
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    onnx.save(model, path)
    ran = run(*what)
    assert ran.code == 1
    assert f"{codes.name}: differs" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_scales_are_not_taken_for_a_weight_of_their_shape(precision: str, tmp_path: Path) -> None:
    """Scales of 32 rows of one block have the shape of DINOv2's mask token, turned, which no graph holds."""
    kind = zoo.by_name("dinov2")
    model = zoo.build(kind)
    model.save_pretrained(tmp_path / "base")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("onnx", *sources, "--output", tmp_path / "exported", "--precision", precision)
    assert ran.code == 0, ran
