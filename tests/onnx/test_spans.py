"""A graph read without its weights is the graph, and damaged ones are called so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ia3_export.errors import DamagedFile, IA3ExportError, NotFound, Refused
from ia3_export.onnx.places import read_graph_file
from ia3_export.onnx.rewrite import write_graph
from ia3_export.onnx.spans import read_light, tensor_spans

KINDS = (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int64, np.bool_)


def _tensor(name: str, array: Any, form: str) -> Any:
    if form == "raw" or array.dtype != np.float32:
        return numpy_helper.from_array(array, name)
    return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.reshape(-1).tolist())


def _model(seed: int = 0, form: str = "raw") -> Any:
    """Initializers of many types, one of them in the body of an If, and a constant."""
    rng = np.random.default_rng(seed)
    tensors = [
        _tensor(f"t{i}", rng.integers(0, 2, tuple(rng.integers(0, 5, i % 4))).astype(kind), form)
        for i, kind in enumerate(KINDS)
    ]
    inner = numpy_helper.from_array(rng.standard_normal((3, 4)).astype("<f4"), "inner")
    body = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])],
        "body",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [inner],
    )
    nodes = [
        helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(np.arange(50.0), "value")),
        helper.make_node("If", ["t6"], ["y"], then_branch=body, else_branch=body),
    ]
    ports = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(nodes, "graph", [], ports, tensors))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), form=st.sampled_from(("raw", "typed")))
def test_a_light_graph_names_the_bytes_of_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, seed: int, form: str
) -> None:
    path = tmp_path_factory.mktemp("spans") / "model.onnx"
    model = _model(seed, form)
    onnx.save(model, path)
    whole = onnx.load(path)
    light = read_light(path)
    assert len(light.SerializeToString()) < len(whole.SerializeToString()) + 2000
    body = whole.graph.node[1].attribute[0].g
    arrays = {t.name: numpy_helper.to_array(t) for t in (*whole.graph.initializer, *body.initializer)}
    spans = {span.name: span for span in tensor_spans(path)}
    for name, span in spans.items():
        raw = path.read_bytes()[span.offset : span.offset + span.nbytes]
        assert raw == arrays[name].tobytes() and span.shape == arrays[name].shape
    missing = {name for name, array in arrays.items() if array.size} - spans.keys()
    assert not missing or form == "typed"


def test_a_graph_that_is_written_anew_is_the_same_model(tmp_path: Path) -> None:
    onnx.save(_model(3), tmp_path / "model.onnx")
    graph = read_graph_file(tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    write_graph(graph, {}, tmp_path / "out" / "model.onnx", changed=True)
    one, other = (onnx.load(tmp_path / folder / "model.onnx") for folder in (".", "out"))
    wanted = [node for node in one.graph.node if node.op_type == "If"]  # nothing reads the constant
    assert [n.SerializeToString() for n in other.graph.node] == [n.SerializeToString() for n in wanted]
    held = {t.name: numpy_helper.to_array(t) for t in one.graph.initializer}
    for tensor in other.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), held[tensor.name])


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 20),
    at=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_damaged_files_are_refused_and_never_crash(
    tmp_path_factory: pytest.TempPathFactory, seed: int, at: float, byte: int, cut: float | None
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    data = bytearray(_model(seed).SerializeToString())
    data[int(at * len(data))] = byte
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        for span in tensor_spans(path):
            assert 0 <= span.offset <= span.offset + span.nbytes <= path.stat().st_size
    except IA3ExportError as error:
        assert error.hint


def test_messages_in_each_other_without_end_are_refused(tmp_path: Path) -> None:
    data = b""
    for _ in range(3000):  # a graph in an attribute of a node of a graph ...
        for tag in (b"\x0a", b"\x2a", b"\x32"):
            size, length = len(data), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            data = tag + length + bytes([size]) + data
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + length + bytes([size]) + data)
    with pytest.raises(DamagedFile):
        tensor_spans(tmp_path / "deep.onnx")


def test_external_data_are_looked_for_beside_the_file_only(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    model = _model()
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "../secret", "offset": "0", "length": "16"}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Refused, match="outside"):
        tensor_spans(folder / "model.onnx")
    for key, value, said in (
        ("offset", "60", "too short"),
        ("length", "8", "in place of 16"),
        ("offset", "x", "cannot be read"),
    ):
        changed = {**entries, "location": "data", key: value}
        del tensor.external_data[:]
        for name, text in changed.items():
            tensor.external_data.add(key=name, value=text)
        (folder / "data").write_bytes(bytes(64))
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(DamagedFile, match=said):
            tensor_spans(folder / "model.onnx")


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_light(tmp_path / "none.onnx")
