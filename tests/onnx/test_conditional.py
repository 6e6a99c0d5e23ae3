"""Two decoders as the branches of one ``If``: optimum's ``decoder_model_merged.onnx``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia3_export.onnx.conditional import merge_decoders
from ia3_export.onnx.files import save_model
from tests.support.exported import Exports

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

_FIRST, _CACHED, _MERGED = "decoder_model", "decoder_with_past_model", "decoder_model_merged"


@pytest.fixture(scope="module")
def files(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two decoders of a T5 and what `merge_decoders` makes of them."""
    import onnx_ir

    separate = exports("t5", "--decoder", "separate")
    merged = tmp_path_factory.mktemp("if") / f"{_MERGED}.onnx"
    first, cached = (onnx_ir.load(separate.graph(stem)) for stem in (_FIRST, _CACHED))
    save_model(merge_decoders(first, cached), merged)
    return {_FIRST: separate.graph(_FIRST), _CACHED: separate.graph(_CACHED), _MERGED: merged}


def test_the_command_writes_just_that(exports: Exports, files: dict[str, Path]) -> None:
    exported = exports("t5", "--decoder", "if")
    assert exported.graph(_MERGED).read_bytes() == files[_MERGED].read_bytes()
    encoder = exports("t5", "--decoder", "separate").graph("encoder_model")
    assert exported.graph("encoder_model").read_bytes() == encoder.read_bytes()


def _run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    wanted = [port.name for port in session.get_inputs()]
    return dict(zip(names, session.run(None, {name: feeds[name] for name in wanted}), strict=True))


@pytest.mark.parametrize(("batch", "encoded", "past", "new"), [(1, 6, 4, 1), (3, 9, 2, 5)])
def test_each_branch_is_its_decoder(
    files: dict[str, Path], batch: int, encoded: int, past: int, new: int
) -> None:
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(5, 300, (batch, new)),
        "encoder_attention_mask": np.ones((batch, encoded), np.int64),
        "encoder_hidden_states": rng.standard_normal((batch, encoded, 32)).astype(np.float32),
    }
    for layer in (0, 1):
        for part in ("key", "value"):
            for side, length in (("decoder", past), ("encoder", encoded)):
                values = rng.standard_normal((batch, 4, length, 16)).astype(np.float32)
                feeds[f"past_key_values.{layer}.{side}.{part}"] = values
    feeds["encoder_attention_mask"][-1, -2:] = 0
    first, cached = (_run(files[stem], feeds) for stem in (_FIRST, _CACHED))
    assert not np.allclose(first["logits"], cached["logits"])
    no, yes = (_run(files[_MERGED], feeds | {"use_cache_branch": np.array([flag])}) for flag in (False, True))
    assert list(no) == list(yes) == list(first)
    for name, value in first.items():
        np.testing.assert_array_equal(no[name], value, err_msg=name)
    for name, value in yes.items():
        # the decoder with past gives no cross-attention cache: it passes through
        passed = feeds[name.replace("present", "past_key_values")] if ".encoder." in name else cached[name]
        np.testing.assert_array_equal(value, passed, err_msg=name)


def _held(path: Path) -> dict[str, bytes]:
    """All initializers and constants, those in branches too."""
    import onnx
    from onnx import numpy_helper

    held: dict[str, bytes] = {}

    def walk(graph: Any, prefix: str) -> None:
        for tensor in graph.initializer:
            held[prefix + tensor.name] = numpy_helper.to_array(tensor).tobytes()
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g, f"{prefix}{attribute.name}/")
                elif attribute.HasField("t"):
                    held[f"{prefix}{node.output[0]}"] = numpy_helper.to_array(attribute.t).tobytes()

    walk(onnx.load(path).graph, "")
    return held


def test_one_if_in_the_main_graph_and_every_weight_once(files: dict[str, Path]) -> None:
    import onnx

    onnx.checker.check_model(str(files[_MERGED]), full_check=True)
    proto = onnx.load(files[_MERGED])
    assert [node.op_type for node in proto.graph.node] == ["If"]
    held = {stem: _held(path) for stem, path in files.items()}
    weights = {stem: [raw for raw in values.values() if len(raw) > 1024] for stem, values in held.items()}
    assert set(weights[_MERGED]) == set(weights[_FIRST]) | set(weights[_CACHED])
    assert len(weights[_MERGED]) == len(set(weights[_MERGED])), "a weight is stored twice"
    assert not any(len(raw) > 1024 for name, raw in held[_MERGED].items() if "_branch/" in name)


def test_large_decoders_become_one_with_its_own_data_and_leave_none_behind(
    exports: Exports, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of more than 1.8 GB. What is traced is read from files here, which is quicker."""
    import onnx_ir

    from ia3_export.onnx import export
    from tests.e2e.command import run

    separate = exports("t5", "--decoder", "separate")
    monkeypatch.setattr(export, "trace", lambda model, spec, opset: onnx_ir.load(separate.graph(spec.file)))
    monkeypatch.setattr(export, "_STREAMED", 0)
    monkeypatch.setattr(
        export, "save_model", lambda model, path, **_: save_model(model, path, external_above=0)
    )
    ran = run(
        "onnx", "--model", separate.base, "--output", tmp_path / "out", "--decoder", "if", "--no-verify"
    )
    assert ran.code == 0, ran
    merged = tmp_path / "out" / "onnx" / f"{_MERGED}.onnx"
    assert _held(merged) == _held(files[_MERGED])
    names = {path.name for path in merged.parent.iterdir()}
    both = {merged.name, "encoder_model.onnx"}
    assert names == both | {f"{name}_data" for name in both}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = config["transformers.js_config"]["use_external_data_format"]
    assert declared == dict.fromkeys(both, 1)
