"""Writing ONNX files: external data as transformers.js looks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export.onnx.files import CHUNK, EXTERNAL, external_files, save_model, size_of
from ia3_export.onnx.package import package

pytestmark = [pytest.mark.filterwarnings("ignore")]

# Rows of 64: a Gemm with five weights of 16 KB and, in between, five biases of 256 bytes.
_WIDTH, _LAYERS = 64, 5


def _model() -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    import onnx_ir as ir

    rng = np.random.default_rng(0)
    weights = {}
    for i in range(_LAYERS):
        weights[f"layer.{i}.weight"] = rng.standard_normal((_WIDTH, _WIDTH)).astype(np.float32) / 8
        weights[f"layer.{i}.bias"] = rng.standard_normal(_WIDTH).astype(np.float32)
    values = {name: ir.Value(name=name, const_value=ir.tensor(w, name=name)) for name, w in weights.items()}
    first = ir.Value(name="x", shape=ir.Shape(["batch", _WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, last = [], first
    for i in range(_LAYERS):
        nodes.append(ir.node("Gemm", [last, values[f"layer.{i}.weight"], values[f"layer.{i}.bias"]]))
        last = nodes[-1].outputs[0]
        last.name = f"layer.{i}"
    last.shape, last.type = ir.Shape(["batch", _WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [first], [last], nodes=nodes, initializers=list(values.values()), opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10), weights


def _expected(weights: dict[str, np.ndarray[Any, Any]], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    for i in range(_LAYERS):
        x = x @ weights[f"layer.{i}.weight"] + weights[f"layer.{i}.bias"]
    return x


def _places(path: Path) -> dict[str, str | None]:
    """Where each initializer lies: a file, or None for the graph itself."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    return {
        t.name: next((e.value for e in t.external_data if e.key == "location"), None)
        for t in proto.graph.initializer
    }


def _check(path: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    x = np.random.default_rng(1).standard_normal((3, _WIDTH)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], _expected(weights, x), rtol=1e-4, atol=1e-5)


def test_small_models_are_one_file_and_the_limits_are_those_of_protobuf_and_browsers(tmp_path: Path) -> None:
    model, weights = _model()
    save_model(model, tmp_path / "new" / "model.onnx")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert external_files(tmp_path / "new" / "model.onnx") == []
    assert set(_places(tmp_path / "new" / "model.onnx").values()) == {None}
    _check(tmp_path / "new" / "model.onnx", weights)
    assert max(EXTERNAL, CHUNK) < 2**31 - 2**26


# 5 weights of 16,384 bytes
@pytest.mark.parametrize(("chunk", "files"), [(10**6, 1), (2 * 16_384, 3), (16_384, 5), (1000, 5)])
def test_external_data_lies_in_chunks_that_transformers_js_finds(
    tmp_path: Path, chunk: int, files: int
) -> None:
    model, weights = _model()
    path = tmp_path / "model_fp16.onnx"
    save_model(model, path, external_above=0, chunk=chunk)
    names = ["model_fp16.onnx_data", *(f"model_fp16.onnx_data_{i}" for i in range(1, files))]
    assert [p.name for p in external_files(path)] == names
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *names}
    assert all(file.stat().st_size <= max(chunk, 16_384) for file in external_files(path))
    places = _places(path)
    assert {name for name, place in places.items() if place is None} == {
        f"layer.{i}.bias" for i in range(_LAYERS)
    }
    assert {place for place in places.values() if place} == set(names)
    _check(path, weights)


def test_a_model_of_the_limit_exactly_is_one_file_and_one_byte_more_is_not(tmp_path: Path) -> None:
    model, weights = _model()
    size = sum(w.nbytes for w in weights.values())
    save_model(model, tmp_path / "a.onnx", external_above=size)
    save_model(model, tmp_path / "b.onnx", external_above=size - 1)
    assert not external_files(tmp_path / "a.onnx") and external_files(tmp_path / "b.onnx")


def test_the_same_model_gives_the_same_bytes_beside_other_files(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        # an encoder's data, and a chunk that a longer model left
        (tmp_path / place / "encoder_model.onnx_data").write_bytes(b"of another")
        save_model(_model()[0], tmp_path / place / "model.onnx", external_above=0, chunk=20_000)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert one == two and one["encoder_model.onnx_data"] == b"of another"


def test_external_data_are_those_that_a_graph_names_in_bodies_and_constants_too(tmp_path: Path) -> None:
    import onnx

    text = """
    <ir_version: 10, opset_import: ["" : 20]> g (bool c) => (float[1] y) {
        one = Constant <value = float[1] {1.0}> ()
        y = If (c) <then_branch = a () => (float[1] t) <float[1] w = {2.0}> { t = Add (w, one) },
                    else_branch = b () => (float[1] e) { e = Identity (one) }>
    }
    """
    model = onnx.parser.parse_model(text)
    held = [model.graph.node[0].attribute[0].t, model.graph.node[1].attribute[0].g.initializer[0]]
    for tensor, name in zip(held, ("weights_10.bin", "weights_2.bin"), strict=True):
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "model.onnx_data").write_bytes(b"of another")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert [file.name for file in external_files(path)] == ["weights_2.bin", "weights_10.bin"]
    assert size_of(path) == path.stat().st_size + 8


def test_saving_twice_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(_model()[0], path, external_above=0, chunk=1000)
    save_model(_model()[0], path, external_above=0, chunk=40_000)
    # chunks of the first lie there still, and no graph names them
    files = external_files(path)
    assert {name for name in _places(path).values() if name} == {file.name for file in files}
    assert (len(files), len(list(tmp_path.iterdir()))) == (3, 1 + 5)
    assert size_of(path) == path.stat().st_size + sum(file.stat().st_size for file in files)
    _check(path, _model()[1])


def test_the_configuration_tells_transformers_js_how_many_chunks_there_are(tmp_path: Path) -> None:
    """By what its 4.3.1 does with it.

    ``+config["<name>.onnx"]``, else ``+config["<name>"]``, is the number of chunks, and chunk ``i`` is
    ``<name>.onnx_data`` or ``<name>.onnx_data_<i>``.
    """
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    save_model(_model()[0], tmp_path / "onnx" / "encoder_model.onnx")
    save_model(
        _model()[0], tmp_path / "onnx" / "decoder_model_merged.onnx", external_above=0, chunk=2 * 16_384
    )
    save_model(_model()[0], tmp_path / "onnx" / "decoder_model_merged_q4.onnx", external_above=0)
    package(tmp_path, ["fp32", "int4"], [])
    settings = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    declared = settings["use_external_data_format"]
    for graph in (tmp_path / "onnx").glob("*.onnx"):
        chunks = [
            f"{graph.name}_data" + (f"_{i}" if i else "")
            for i in range(int(declared.get(graph.name, declared.get(graph.stem, 0))))
        ]
        assert chunks == [file.name for file in external_files(graph)]
    assert sum(map(int, declared.values())) == 4
    assert settings["dtype"] == "q4"
