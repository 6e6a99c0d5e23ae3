"""Tensors inside of ONNX files, beside them, and in GGUF's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ia3_export
from ia3_export.patching.format import Copy, FoldRule, Stored, read_patch
from ia3_export.patching.regions import graph_regions, list_regions
from tests.e2e.command import contents


def write_graph(path: Path, weights: dict[str, Any], *, external: bool) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, None) for name in weights]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs, tensors
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, producer_name="tests")
    where = (
        {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0} if external else {}
    )
    onnx.save(model, path, **where)


def two_folders(folder: Path, *, external: bool) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((48, 64)).astype("<f4") for name in ("k", "down", "same")}
    weights["codes"] = random.integers(-128, 128, (48, 64)).astype("i1")
    weights["scales"] = random.random(64).astype("<f4")
    for name in ("base", "merged"):
        write_graph(folder / name / "onnx" / "model.onnx", weights, external=external)
        weights["k"] = weights["k"] * random.standard_normal(64).astype("<f4")
        weights["down"] = weights["down"] * random.standard_normal((48, 1)).astype("<f4")
        weights["scales"] = weights["scales"] * random.random(64).astype("<f4")
    return folder / "base", folder / "merged"


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_initializers_are_folded_where_they_lie(tmp_path: Path, external: bool) -> None:
    base, merged = two_folders(tmp_path, external=external)
    made = ia3_export.patch(base, merged, tmp_path / "p.ia3patch")
    pieces = [piece for change in read_patch(made.path).files for piece in change.pieces]
    assert sum(isinstance(piece, FoldRule) for piece in pieces) == 2
    # 64 scales are as long as their vector
    assert [piece.length for piece in pieces if isinstance(piece, Stored)] == [256]
    ia3_export.apply(made.path, base)
    assert contents(base) == contents(merged)
    ia3_export.revert(base)


def test_graphs_that_share_external_data_have_every_byte_once(tmp_path: Path) -> None:
    base, _ = two_folders(tmp_path, external=True)
    data = (base / "onnx" / "model.onnx").read_bytes()
    (base / "onnx" / "other.onnx").write_bytes(data)
    graphs = graph_regions(base, ["onnx/model.onnx", "onnx/other.onnx"])
    regions = list_regions(base / "onnx" / "weights.bin", graphs)
    assert sorted(region.name for region in regions) == ["codes", "down", "k", "same", "scales"]
    ends = [region.offset + region.nbytes for region in regions]
    assert all(end <= region.offset for end, region in zip(ends, regions[1:], strict=False))


def test_only_the_scales_of_a_gguf_block_take_a_factor() -> None:
    from tests.support.quantized import source_of

    regions = {region.name: region for region in list_regions(source_of("gguf-q4_k"), {})}
    region = regions["blk.0.attn_k.weight"]
    assert (region.dtype, region.stride, region.at) == ("F16", 144, (0, 2))
    norm = regions["blk.0.attn_norm.weight"]
    assert (norm.dtype, norm.stride, norm.at) == ("F32", 4, (0,))


def test_a_longer_header_moves_what_is_copied(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((48, 64)).astype("<f4") for name in ("a", "b", "c")}
    for name in ("base", "merged"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt", "note": name * 9})
        weights["b"] = weights["b"] * random.standard_normal((48, 1)).astype("<f4")
    made = ia3_export.patch(tmp_path / "base", tmp_path / "merged", tmp_path / "p")
    (change,) = read_patch(made.path).files
    kinds = [type(piece) for piece in change.pieces]
    assert kinds.count(FoldRule) == 1 and kinds.count(Copy) >= 2 and kinds.count(Stored) == 1
    ia3_export.apply(made.path, tmp_path / "base")
    assert contents(tmp_path / "base") == contents(tmp_path / "merged")
