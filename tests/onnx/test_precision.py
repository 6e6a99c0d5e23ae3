"""float16, int8 and int4 of real exports.

What they reach, how near they stay, and what ONNX Runtime's own tools would do.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export.errors import Unsupported
from ia3_export.onnx import precision as precisions
from ia3_export.onnx.blocks import decode, encode
from ia3_export.onnx.files import external_files, save_model
from ia3_export.onnx.precision import Coverage, convert_precision
from ia3_export.onnx.rounding import encode_nearest
from tests.support.exported import Exports

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

PRECISIONS = ("fp16", "int8", "q8", "int4")
#: Least cosine of the logits of random models, whose weights are harder to quantize than trained ones.
NEAR = {"fp16": 0.99999, "int8": 0.9995, "q8": 0.9995, "int4": 0.9}


@pytest.fixture
def graphs(exports: Exports) -> dict[str, Path]:
    """Exports: bert is an encoder, gpt2's layers are Gemm, llama-biased has a tied head and RoPE."""
    return {name: exports(name).graph() for name in ("bert-masked-lm", "gpt2", "llama-biased")}


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, batch: int, length: int, past: int, first: int = 0) -> dict[str, Any]:
    """Random ids after a random cache; `first` is the position of the cache's first token."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    cached = any(i.name.startswith("past") for i in session.get_inputs())
    past = past if cached else 0
    for port in session.get_inputs():
        if port.name == "input_ids":
            feeds[port.name] = rng.integers(5, 90, (batch, length))
        elif port.name == "attention_mask":
            feeds[port.name] = np.ones((batch, past + length), np.int64)
        elif port.name == "position_ids":
            feeds[port.name] = np.broadcast_to(first + np.arange(past, past + length), (batch, length))
        elif port.name == "token_type_ids":
            feeds[port.name] = np.zeros((batch, length), np.int64)
        else:
            shape = (batch, port.shape[1], past, port.shape[3])
            feeds[port.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def _error(one: Any, other: Any, feeds: dict[str, Any]) -> float:
    expected, got = one.run(None, feeds)[0], other.run(None, feeds)[0]
    return float(abs(got - expected).max() / abs(expected).max())


def _ports(session: Any) -> list[tuple[str, Any, str]]:
    return [(p.name, p.shape, p.type) for p in (*session.get_inputs(), *session.get_outputs())]


def _operators(path: Path) -> Counter[str]:
    import onnx_ir

    return Counter(node.op_type for node in onnx_ir.load(path).graph.all_nodes())


def _tensors(path: Path) -> dict[str, np.ndarray]:
    import onnx_ir

    return {name: v.const_value.numpy() for name, v in onnx_ir.load(path).graph.initializers.items()}


def _write(path: Path, text: str, weights: dict[str, np.ndarray]) -> Path:
    """A graph in ONNX's text form with `weights` as initializers."""
    import onnx

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    onnx.save(model, path)
    return path


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["bert-masked-lm", "gpt2", "llama-biased"])
def test_it_runs_with_the_same_inputs_and_outputs_and_stays_near(
    graphs: dict[str, Path], tmp_path: Path, name: str, precision: Any
) -> None:
    target = tmp_path / "model.onnx"
    convert_precision(graphs[name], target, precision)
    one, other = _open(graphs[name]), _open(target)
    assert _ports(other) == _ports(one)
    for batch, length, past in ((2, 5, 3), (1, 4, 0), (3, 1, 9)):
        feeds = _feeds(one, batch, length, past)
        a, b = (session.run(None, feeds)[0].ravel() for session in (one, other))
        assert a @ b > NEAR[precision] * np.sqrt((a @ a) * (b @ b))
    written = target.read_bytes()
    assert str(tmp_path).encode() not in written and str(graphs[name].parent).encode() not in written
    assert len(written) < graphs[name].stat().st_size


def test_all_matrices_are_reached_and_position_tables_are_left(
    graphs: dict[str, Path], tmp_path: Path
) -> None:
    for name, table in (
        ("bert-masked-lm", "bert.embeddings.position_embeddings.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("llama-biased", None),
    ):
        weights = {
            n: a
            for n, a in _tensors(graphs[name]).items()
            if a.dtype == np.float32 and a.nbytes > 1024 and a.ndim > 1
        }
        total = sum(array.nbytes for array in weights.values())
        assert total > 0
        assert convert_precision(graphs[name], tmp_path / "fp16.onnx", "fp16") == Coverage(total, total, ())
        for precision in ("int8", "q8", "int4"):
            left = (table,) if table else ()
            rest = sum(weights[n].nbytes for n in left)
            assert convert_precision(graphs[name], tmp_path / "q.onnx", precision) == Coverage(
                total, total - rest, left
            )
            kinds = _operators(tmp_path / "q.onnx")
            assert not kinds["Gemm"]
            # attention multiplies activations: two products in each of two layers
            assert precision != "int8" or kinds["MatMul"] == 4
            assert (kinds["MatMulNBits"] == 0) == (precision == "q8")


TIED = """
g (int64[n, m] input_ids) => (float[n, m, 96] logits) {
  x = Gather(embedding, input_ids)
  head = Transpose <perm = [1, 0]> (embedding)
  logits = MatMul(x, head)
}
"""


@pytest.mark.parametrize("width", [64, 40, 96])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tied_head_stays_tied(tmp_path: Path, precision: Any, width: int) -> None:
    source = _write(tmp_path / "source.onnx", TIED, {"embedding": _random(96, width)})
    coverage = convert_precision(source, tmp_path / "target.onnx", precision)
    one, other = _open(source), _open(tmp_path / "target.onnx")
    error = _error(one, other, {"input_ids": np.arange(10).reshape(2, 5)})
    assert error < {"fp16": 1e-3, "int8": 0.01, "q8": 0.01, "int4": 0.01}[precision]
    assert coverage.left == ()
    large = [
        name for name, array in _tensors(tmp_path / "target.onnx").items() if array.size >= 96 * width / 2
    ]
    assert large == ["embedding" if precision == "fp16" else "embedding_Q8"]


@pytest.mark.parametrize("width", [64, 96])
def test_a_table_of_4_bits_is_looked_up_with_plain_operators(tmp_path: Path, width: int) -> None:
    """The rows are those that the head multiplies with."""
    table = _random(96, width)
    source = _write(tmp_path / "source.onnx", TIED, {"embedding": table})
    codes = encode(table, 4)
    convert_precision(source, tmp_path / "target.onnx", "int4", {"embedding": codes})
    kinds = _operators(tmp_path / "target.onnx")
    assert (kinds["MatMulNBits"], kinds["GatherBlockQuantized"]) == (1, 0)
    large = [name for name, array in _tensors(tmp_path / "target.onnx").items() if array.size >= 48 * width]
    assert large == ["embedding_Q4"]
    rows = decode(codes, width)
    ids = np.arange(96).reshape(2, 48)
    logits = _open(tmp_path / "target.onnx").run(None, {"input_ids": ids})[0]
    # the product rounds activations to 8 bits; the lookup is exact
    expected = rows[ids] @ rows.T
    assert abs(logits - expected).max() < 0.02 * abs(expected).max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_processes_write_the_same_bytes_and_leave_logging_alone(
    graphs: dict[str, Path], tmp_path: Path, precision: Any
) -> None:
    source = graphs["llama-biased"]
    for name in ("one", "two"):
        script = (
            "import logging, pathlib; from ia3_export.onnx.precision import convert_precision\n"
            f"convert_precision(pathlib.Path({str(source)!r}), pathlib.Path({str(tmp_path / name)!r}), "
            f"{precision!r})\nassert not logging.root.handlers and logging.root.level == logging.WARNING"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_external_data_are_read_and_written(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    import onnx_ir

    convert_precision(graphs["gpt2"], tmp_path / "inline.onnx", precision)
    source = tmp_path / "external" / "model.onnx"
    save_model(onnx_ir.load(graphs["gpt2"]), source, external_above=0)
    assert external_files(source)
    # nothing in the result may point to the source's file, not even the weights that are left in float32
    convert_precision(source, tmp_path / "again.onnx", precision)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "inline.onnx").read_bytes()

    monkeypatch.setattr(precisions, "save_model", partial(save_model, external_above=0))
    target = source.with_name("model_q.onnx")
    convert_precision(source, target, precision)
    assert [file.name for file in external_files(target)] == ["model_q.onnx_data"]
    one, other = _open(tmp_path / "inline.onnx"), _open(target)
    feeds = _feeds(one, 2, 5, 3)
    assert all(
        np.array_equal(a, b) for a, b in zip(one.run(None, feeds), other.run(None, feeds), strict=True)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_without_weights_for_it_is_refused(tmp_path: Path, precision: Any) -> None:
    source = _write(
        tmp_path / "source.onnx", "g (float[n, 4] x) => (float[n, 4] y) { y = Add(x, b) }", {"b": _random(4)}
    )
    with pytest.raises(Unsupported, match=f"no weight that {precision} reaches") as caught:
        convert_precision(source, tmp_path / "target.onnx", precision)
    assert f"--precision {precision}" in caught.value.hint
    assert not (tmp_path / "target.onnx").exists()


IF = """
g (bool cached, float[n, 32] x) => (float[n, 48] y) {
  y = If (cached) <
    then_branch = then () => (float[n, 48] a) {
      one = MatMul(x, shared)  low = Min(one, bound)  a = Add(low, low)
    },
    else_branch = other () => (float[n, 48] b) {
      two = MatMul(x, shared)  three = MatMul(x, own)  b = Add(two, three)
    }
  >
}
"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bodies_of_if_are_covered_and_share_their_codes(tmp_path: Path, precision: Any) -> None:
    weights = {"shared": _random(32, 48), "own": _random(32, 48) * 2, "bound": np.array(3, np.float32)}
    source = _write(tmp_path / "source.onnx", IF, weights)
    total = 2 * 32 * 48 * 4
    assert convert_precision(source, tmp_path / "target.onnx", precision) == Coverage(total, total, ())
    codes = [n for n, a in _tensors(tmp_path / "target.onnx").items() if a.size >= 32 * 48 / 2]
    assert len(codes) == 2
    # Min is on ONNX Runtime's list of operators without float16 kernels
    assert precision != "fp16" or _tensors(tmp_path / "target.onnx")["bound"].dtype == np.float32
    one, other = _open(source), _open(tmp_path / "target.onnx")
    for cached in (True, False):
        feeds = {"cached": np.array(cached), "x": _random(3, 32)}
        assert _error(one, other, feeds) < {"fp16": 1e-3, "int8": 0.01, "q8": 0.01, "int4": 0.25}[precision]


EXPERTS = """
g (float[n, 32] x) => (float[n, 32] y) {
  up0, up1 = Split <axis = 0, num_outputs = 2> (up)
  axis = Constant <value = int64[1] {0}> ()
  w0 = Squeeze(up0, axis)
  w1 = Squeeze(up1, axis)
  t1 = Transpose <perm = [1, 0]> (w1)
  a = MatMul(x, w0)
  y = MatMul(a, t1)
}
"""


@pytest.mark.parametrize("precision", ["int8", "q8", "int4"])
def test_weights_that_are_cut_from_experts_are_reached(tmp_path: Path, precision: Any) -> None:
    source = _write(tmp_path / "source.onnx", EXPERTS, {"up": _random(2, 32, 48)})
    assert convert_precision(source, tmp_path / "target.onnx", precision).left == ()
    assert not _operators(tmp_path / "target.onnx")["Split"]
    error = _error(_open(source), _open(tmp_path / "target.onnx"), {"x": _random(3, 32)})
    assert error < {"int8": 0.02, "q8": 0.02, "int4": 0.25}[precision]


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_session_without_optimizations_gives_the_same(tmp_path: Path, precision: Any) -> None:
    """``MatMulNBits`` does not, where its scales are no constants."""
    import onnxruntime

    source = _write(tmp_path / "source.onnx", TIED, {"embedding": _random(96, 64)})
    convert_precision(source, tmp_path / "target.onnx", precision)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feeds = {"input_ids": np.arange(10).reshape(2, 5)}
    plain = onnxruntime.InferenceSession(str(tmp_path / "target.onnx"), options)
    expected = _open(tmp_path / "target.onnx").run(None, feeds)[0]
    assert abs(plain.run(None, feeds)[0] - expected).max() < 1e-5 * abs(expected).max()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("inputs", [32, 40])
def test_batches_of_experts_have_eight_bits(tmp_path: Path, precision: Any, inputs: int) -> None:
    text = f"g (float[2, n, {inputs}] x) => (float[2, n, 48] y) {{ y = MatMul(x, experts) }}"
    source = _write(tmp_path / "source.onnx", text, {"experts": _random(2, inputs, 48)})
    assert convert_precision(source, tmp_path / "target.onnx", precision).left == ()
    assert _error(_open(source), _open(tmp_path / "target.onnx"), {"x": _random(2, 3, inputs)}) < 0.01


def test_scaled_gemms_stay_float32(tmp_path: Path) -> None:
    text = (
        "g (float[n, 32] x) => (float[n, 48] z) { y = MatMul(x, plain)  z = Gemm <alpha = 0.5> "
        "(y, scaled, b) }"
    )
    weights = {"plain": _random(32, 48), "scaled": _random(48, 48), "b": _random(48)}
    coverage = convert_precision(
        _write(tmp_path / "source.onnx", text, weights), tmp_path / "int8.onnx", "int8"
    )
    assert coverage.left == ("scaled",)


def test_convolutions_hold_eight_bits_and_compute_in_float32(tmp_path: Path) -> None:
    text = """g (float[n, 16, 9] x) => (float[n, 8, 9] z)
      { y = Conv <pads = [1, 1]> (x, w, b)  z = Conv <pads = [1, 1], group = 8> (y, depthwise) }"""
    weights = {"w": _random(8, 16, 3), "b": _random(8), "depthwise": _random(8, 1, 3)}
    source = _write(tmp_path / "source.onnx", text, weights)
    assert convert_precision(source, tmp_path / "int8.onnx", "int8") == Coverage(
        8 * 16 * 3 * 4, 8 * 16 * 3 * 4, ()
    )
    assert _error(_open(source), _open(tmp_path / "int8.onnx"), {"x": _random(2, 16, 9)}) < 0.01
    assert convert_precision(source, tmp_path / "int4.onnx", "int4").left == ()


@pytest.mark.parametrize(("precision", "share"), [("int8", 1.1), ("q8", 0.8)])
def test_eight_bits_are_no_farther_than_quantize_dynamic(
    graphs: dict[str, Path], tmp_path: Path, precision: str, share: float
) -> None:
    """A processor whose 8-bit products do not saturate is the best case for ``quantize_dynamic``; with others
    it is several times as far. Rows are one block long here, so that blocks give no advantage.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = graphs["bert-masked-lm"]
    convert_precision(source, tmp_path / "ours.onnx", precision)
    quantize_dynamic(source, tmp_path / "theirs.onnx", per_channel=True, weight_type=QuantType.QInt8)
    one = _open(source)
    feeds = _feeds(one, 4, 32, 0)
    ours, theirs = (_error(one, _open(tmp_path / f"{name}.onnx"), feeds) for name in ("ours", "theirs"))
    assert ours <= share * theirs


@pytest.mark.parametrize("inputs", [64, 48, 32, 96])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_as_near_as_those_of_matmul_nbits_quantizer(tmp_path: Path, inputs: int, bits: int) -> None:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    text = f"g (float[n, {inputs}] x) => (float[n, 40] y) {{ y = MatMul(x, w) }}"
    source = _write(tmp_path / "source.onnx", text, {"w": _random(inputs, 40)})
    convert_precision(source, tmp_path / "ours.onnx", f"int{bits}")
    config = tool.DefaultWeightOnlyQuantConfig(block_size=32, bits=bits, is_symmetric=bits == 8)
    theirs = tool.MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    theirs.process()
    theirs.model.save_model_to_file(str(tmp_path / "theirs.onnx"))
    feeds = {"x": np.eye(inputs, dtype=np.float32)}  # the weight itself, as the operator decodes it
    one = _open(source).run(None, feeds)[0]
    errors = [
        float(((_open(tmp_path / f"{name}.onnx").run(None, feeds)[0] - one) ** 2).mean())
        for name in ("ours", "theirs")
    ]
    assert errors[0] <= 1.05 * errors[1]


def test_float16_keeps_positions_that_float16_cannot_count(graphs: dict[str, Path], tmp_path: Path) -> None:
    convert_precision(graphs["llama-biased"], tmp_path / "fp16.onnx", "fp16")
    one, other = _open(graphs["llama-biased"]), _open(tmp_path / "fp16.onnx")
    near, far = (_error(one, other, _feeds(one, 2, 5, 3, first)) for first in (0, 5003))
    assert far < 2 * near  # the tool's: 40 times


def _strict(path: Path, feeds: dict[str, Any]) -> np.ndarray:
    """The first output by ONNX's reference implementation, which does compute in float16.

    ONNX Runtime does so on GPUs only.
    """
    from onnx.reference import ReferenceEvaluator

    output: np.ndarray = ReferenceEvaluator(str(path)).run(None, feeds)[0]
    return output


def test_float16_survives_large_activations(graphs: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(graphs["llama-biased"])
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [128, 32]:  # the embedding, whose squares are no float16
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(array * np.float32(2000 / abs(array).max()), tensor.name)
            )
    onnx.save(model, tmp_path / "large.onnx")
    convert_precision(tmp_path / "large.onnx", tmp_path / "fp16.onnx", "fp16")
    one = _open(tmp_path / "large.onnx")
    feeds = _feeds(one, 2, 5, 3)
    expected = one.run(None, feeds)[0]
    assert abs(_strict(tmp_path / "fp16.onnx", feeds) - expected).max() < 1e-2 * abs(expected).max()


def test_float16_rows_without_anything_to_attend_to_stay_finite(
    graphs: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("bert-masked-lm", "llama-biased"):
        convert_precision(graphs[name], tmp_path / "fp16.onnx", "fp16")
        session = _open(tmp_path / "fp16.onnx")
        feeds = _feeds(session, 2, 5, 0)
        feeds["attention_mask"][0] = 0
        assert np.isfinite(session.run(None, feeds)[0]).all()
        assert np.isfinite(_strict(tmp_path / "fp16.onnx", feeds)).all()


def _attention(path: Path, minimum: float) -> Path:
    text = """g (float[n, 32] x, int64[n, n] mask) => (float[n, n] p) {
      scores = MatMul(x, w)  more = MatMul(scores, v)
      float_mask = Cast <to = 1> (mask)  off = Sub(one, float_mask)  bias = Mul(off, least)
      sum = Add(more, bias)  p = Softmax(sum)
    }"""
    weights = {
        "w": _random(32, 32),
        "v": _random(32, 9),
        "one": np.array(1, np.float32),
        "least": np.array(minimum, np.float32),
    }
    return _write(path, text.replace("[n, n]", "[n, 9]"), weights)


@pytest.mark.parametrize("minimum", [float(np.finfo(np.float32).min), -1e9, -10000.0])
def test_float16_masks_with_large_scores(tmp_path: Path, minimum: float) -> None:
    source = _attention(tmp_path / "source.onnx", minimum)
    convert_precision(source, tmp_path / "fp16.onnx", "fp16")
    mask = np.ones((3, 9), np.int64)
    mask[1, 4:] = 0
    mask[2] = 0  # its row is softmax(scores + minimum): finite, whatever it is
    feeds = {"x": _random(3, 32) * 10, "mask": mask}
    expected = _open(source).run(None, feeds)[0]
    got = _strict(tmp_path / "fp16.onnx", feeds)
    assert abs(_open(tmp_path / "fp16.onnx").run(None, feeds)[0] - got).max() < 0.02
    assert np.isfinite(got).all()
    assert abs(got[:2] - expected[:2]).max() < 0.02
    assert (got[1, 4:] == 0).all()


def test_float16_constants_out_of_range_become_masks_or_the_largest_number() -> None:
    from ia3_export.onnx.float16 import halved

    given = np.array([1e-3, 7e4, -7e4, -3.4e38, -np.inf, np.inf], np.float32)
    assert halved(given).tolist() == [np.float16(1e-3), 65504.0, -30000.0, -30000.0, -np.inf, np.inf]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e7])
def test_every_code_is_within_a_step_of_its_weight(bits: int, size: float) -> None:
    matrix = _random(6, 100) * np.float32(size)
    matrix[2] = 0
    matrix[3, 40] = 50 * size  # an outlier costs its own block only
    matrix[4] = abs(matrix[4]) + size
    codes = encode(matrix, bits)
    steps = np.repeat(codes.scales, 32, axis=1)[:, :100]
    decoded = decode(codes, 100)
    assert (abs(decoded - matrix) <= steps * (0.501 if bits == 8 else 1.001)).all()
    assert (decoded[2] == 0).all()
    assert codes.packed.dtype == np.uint8 and codes.packed.shape == (6, 4, 4 * bits)
    if size < 1e3:
        assert np.array_equal(codes.scales.astype(np.float16), codes.scales)


def test_codes_of_gguf_are_found_again() -> None:
    """Weights that lie on 16 places between least and largest of a block, as in Q4_1, lose next to
    nothing."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (40, 8, 32)).astype(np.float32)
    codes[..., :2] = (0, 15)
    scales, least = (rng.uniform(low, high, (40, 8, 1)) for low, high in ((0.01, 0.03), (-0.4, -0.1)))
    matrix = (codes * scales + least).reshape(40, -1).astype(np.float32)
    for made in (encode(matrix, 4), encode_nearest(matrix, None)):
        assert abs(decode(made, 256) - matrix).max() < 0.02 * 0.03
