"""Codes that are there already, in the blocks of ``MatMulNBits``: none changes, and products are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ia3_export.errors import Unsupported
from ia3_export.fold import Array
from ia3_export.onnx.blocks import Codes, decode
from ia3_export.onnx.kept import lay_out, stands_for
from ia3_export.onnx.precision import Coverage, convert_precision
from ia3_export.quantization.coded import CodedRows, NotCoded

pytestmark = pytest.mark.filterwarnings("ignore")


def _rows(
    bits: int, group: int, columns: int, *, zeros: str = "middle", offsets: bool = False, ordered: bool = True
) -> CodedRows:
    """Random codes of 48 rows."""
    rng = np.random.default_rng(bits * group * columns)
    shape = (48, -(-columns // group))
    points = {
        "middle": np.full(shape, 2 ** (bits - 1)),
        "one": np.full(shape, 2**bits - 1),
        "each": rng.integers(0, 2**bits, shape),
        "floats": rng.uniform(0, 2**bits, shape),
    }
    return CodedRows(
        codes=rng.integers(0, 2**bits, (48, columns)).astype("u1"),
        bits=bits,
        scales=(rng.uniform(0.5, 1, shape) / 2**bits).astype("f4"),
        zeros=points[zeros].astype("f4"),
        offsets=rng.normal(size=shape).astype("f4") if offsets else None,
        group=group,
        order=None if ordered else rng.permutation(columns),
    )


def _weight(rows: CodedRows, factors: Array | None) -> Array:
    """What `rows` stand for, times `factors`, in float64."""
    which = np.arange(rows.codes.shape[1]) // rows.group
    values = (rows.codes.astype("f8") - rows.zeros[:, which]) * rows.scales[:, which]
    values += 0 if rows.offsets is None else rows.offsets[:, which]
    weight = np.empty_like(values)
    weight[:, np.arange(len(which)) if rows.order is None else rows.order] = values
    return weight if factors is None else weight * factors[:, None]


def _whole_numbers(codes: Codes, columns: int) -> Array:
    packed = codes.packed
    if codes.bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    return packed.reshape(len(packed), -1)[:, :columns]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([16, 32, 48, 64, 96, 1000]),
    columns=st.sampled_from([32, 80, 96, 100, 192, 256]),
    zeros=st.sampled_from(["middle", "one", "each", "floats"]),
    offsets=st.booleans(),
    ordered=st.booleans(),
    folded=st.booleans(),
)
def test_no_code_changes_and_the_weight_is_the_same(
    bits: int, group: int, columns: int, zeros: str, offsets: bool, ordered: bool, folded: bool
) -> None:
    rows = _rows(bits, min(group, columns), columns, zeros=zeros, offsets=offsets, ordered=ordered)
    factors = np.random.default_rng(0).normal(size=48) if folded else None
    codes = lay_out(rows, factors)
    weight = _weight(rows, factors)
    largest = np.abs(weight).max() + (0 if codes.offsets is None else np.abs(codes.offsets).max())
    assert np.abs(decode(codes, columns) - weight).max() <= 3e-7 * largest
    assert stands_for(codes, weight.astype("f4"))
    shifted = _whole_numbers(codes, columns).astype(int) - rows.codes
    assert (shifted == shifted.flat[0]).all()
    assert codes.bits == (4 if bits <= 4 else 8) and codes.block in (16, 32, 64, 128, 256)
    assert codes.scales.dtype == np.float32 and codes.packed.shape[:2] == codes.scales.shape


@pytest.mark.parametrize("zero", ["middle", "each"])
def test_wide_codes_of_few_values_have_four_bits(zero: str) -> None:
    few = _rows(4, 32, 96, zeros=zero)
    wide = replace(few, codes=few.codes + np.uint8(120), zeros=few.zeros + 120, bits=8)
    codes = lay_out(wide, None)
    assert codes.bits == 4 and (codes.zeros is None) == (zero == "middle")
    np.testing.assert_array_equal(decode(codes, 96), decode(lay_out(few, None), 96))
    wide.codes[0, 0] = 5
    assert lay_out(wide, None).bits == 8


def test_groups_that_no_block_divides_are_refused() -> None:
    with pytest.raises(NotCoded, match="groups of 24 columns are no multiple of 16"):
        lay_out(_rows(4, 24, 96), None)


def test_one_wrong_code_stands_for_another_weight() -> None:
    rows = _rows(4, 32, 96, zeros="each", ordered=False)
    codes, weight = lay_out(rows, None), _weight(rows, None).astype("f4")
    assert stands_for(codes, weight)
    codes.packed[3, 1, 5] ^= 16
    assert not stands_for(codes, weight)
    assert not stands_for(codes, weight[:, :64]) and not stands_for(codes, weight[:40])


def _graph(path: Path, weight: Array, table: bool) -> Path:
    rows, columns = weight.shape
    if table:
        node = helper.make_node("Gather", ["w", "input_ids"], ["y"])
        given_in = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])
        stored, width = weight, columns
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        given_in = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "n", columns])
        stored, width = np.ascontiguousarray(weight.T), rows
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", width])
    graph = helper.make_graph([node], "g", [given_in], [out], [numpy_helper.from_array(stored, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _run(path: Path, feeds: dict[str, Any], *, optimized: bool) -> Array:
    import onnxruntime

    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output: Array = session.run(None, feeds)[0]
    return output


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("table", [False, True], ids=["product", "table"])
@pytest.mark.parametrize(
    ("bits", "group", "columns", "zeros", "offsets"),
    [
        (4, 32, 96, "middle", False),
        (4, 32, 96, "each", False),
        (4, 128, 128, "each", True),  # one block
        (4, 48, 144, "floats", False),  # blocks of 16
        (4, 100, 100, "middle", False),  # the last block is not full
        (4, 100, 100, "floats", True),
        (3, 64, 192, "one", False),
        (8, 32, 96, "middle", False),
        (8, 32, 96, "each", False),
        (6, 16, 96, "one", True),
    ],
)
def test_onnx_runtime_computes_with_them_as_with_the_weight(
    tmp_path: Path,
    bits: int,
    group: int,
    columns: int,
    zeros: str,
    offsets: bool,
    table: bool,
    optimized: bool,
) -> None:
    rows = _rows(bits, group, columns, zeros=zeros, offsets=offsets)
    weight = _weight(rows, None).astype("f4")
    source, target = _graph(tmp_path / "source.onnx", weight, table), tmp_path / "target.onnx"
    coverage = convert_precision(source, target, "keep", {"w": lay_out(rows, None)})
    assert coverage == Coverage(weight.nbytes, weight.nbytes, ())
    if table:
        feeds: dict[str, Any] = {"input_ids": np.arange(10).reshape(2, 5)}
        wanted = weight[feeds["input_ids"]]
    else:
        feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, columns)).astype("f4")}
        wanted = feeds["x"].astype("f8") @ weight.T
    found = _run(target, feeds, optimized=optimized)
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    names = [node.op_type for node in onnx.load(target).graph.node]
    exact = bits <= 4 and not table and not (offsets and columns == 100)
    assert ("MatMulNBits" in names) == exact


def test_columns_in_another_order_are_multiplied_with_inputs_in_that_order(tmp_path: Path) -> None:
    for bits in (4, 8):
        rows = _rows(bits, 32, 96, zeros="each", ordered=False)
        weight = _weight(rows, None).astype("f4")
        target = tmp_path / "target.onnx"
        convert_precision(
            _graph(tmp_path / "source.onnx", weight, False), target, "keep", {"w": lay_out(rows, None)}
        )
        x = np.random.default_rng(0).normal(size=(1, 3, 96)).astype("f4")
        found = _run(target, {"x": x}, optimized=True)
        assert np.abs(found - x @ weight.T).max() <= 2e-6 * np.abs(found).max()


def test_codes_of_another_weight_are_not_used(tmp_path: Path) -> None:
    rows = _rows(4, 32, 96)
    weight = _weight(rows, None).astype("f4")
    weight[7, 5] += 0.01
    source = _graph(tmp_path / "source.onnx", weight, False)
    with pytest.raises(Unsupported, match="no weight that keep reaches"):
        convert_precision(source, tmp_path / "target.onnx", "keep", {"w": lay_out(rows, None)})


def test_a_graph_may_have_no_codes_where_the_one_beside_it_has(tmp_path: Path) -> None:
    weight = _weight(_rows(4, 32, 96), None).astype("f4")
    source = _graph(tmp_path / "source.onnx", weight, False)
    coverage = convert_precision(source, tmp_path / "target.onnx", "keep", {})
    assert coverage == Coverage(weight.nbytes, 0, ("w",))
    x = np.random.default_rng(0).normal(size=(1, 3, 96)).astype("f4")
    one, other = (_run(path, {"x": x}, optimized=True) for path in (source, tmp_path / "target.onnx"))
    np.testing.assert_array_equal(one, other)


TIED = """
g (int64[n, m] input_ids) => (float[n, m, 48] logits) {
  x = Gather(embedding, input_ids)
  head = Transpose <perm = [1, 0]> (embedding)
  logits = MatMul(x, head)
}
"""


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_reads_the_codes_of_the_embedding(tmp_path: Path, bits: int) -> None:
    rows = _rows(bits, 32, 96, zeros="each")
    weight = _weight(rows, None).astype("f4")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {TIED}')
    model.graph.initializer.append(numpy_helper.from_array(weight, "embedding"))
    onnx.save(model, tmp_path / "source.onnx")
    target = tmp_path / "target.onnx"
    convert_precision(tmp_path / "source.onnx", target, "keep", {"embedding": lay_out(rows, None)})
    held = [t.name for t in onnx.load(target).graph.initializer if t.name.startswith("embedding_Q")]
    assert held == [f"embedding_Q{bits}"]
    ids = np.arange(10).reshape(2, 5)
    wanted = weight[ids].astype("f8") @ weight.T
    assert (
        np.abs(_run(target, {"input_ids": ids}, optimized=True) - wanted).max() <= 2e-6 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(("dtype", "name"), [("f2", "FLOAT16"), ("bfloat16", "BFLOAT16"), ("f4", "FLOAT")])
def test_weights_without_codes_have_16_bits_where_that_is_exact(
    tmp_path: Path, dtype: str, name: str
) -> None:
    text = "g (float[n, 96] x) => (float[n, 48] z) { y = MatMul(x, w)  z = MatMul(y, v) }"
    rows = _rows(4, 32, 96)
    other = np.random.default_rng(1).normal(size=(48, 48)).astype("f4")
    if dtype == "bfloat16":
        other = (other.view("<u4") & 0xFFFF0000).view("<f4")
        other[0, 0] = 2.0**100  # no float16
    else:
        other = other.astype(dtype).astype("f4")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    weight = _weight(rows, None).astype("f4")
    for key, array in (("w", np.ascontiguousarray(weight.T)), ("v", other)):
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    onnx.save(model, tmp_path / "source.onnx")
    target = tmp_path / "target.onnx"
    coverage = convert_precision(tmp_path / "source.onnx", target, "keep", {"w": lay_out(rows, None)})
    assert coverage.left == ("v",) and coverage.converted_bytes == weight.nbytes
    held = {t.name: TensorProto.DataType.Name(t.data_type) for t in onnx.load(target).graph.initializer}
    assert held["v"] == name
    x = np.random.default_rng(0).normal(size=(3, 96)).astype("f4")
    wanted = x.astype("f8") @ weight.T @ other
    for optimized in (True, False):
        found = _run(target, {"x": x}, optimized=optimized)
        assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
