"""``onnx`` of what stays quantized: the dense model that it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ia3_export.checkpoint.folder import read_checkpoint
from tests.e2e.command import run
from tests.support.quantized import dense_model, logits, source_of, unmerged_logits, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def _adapter(case: str, folder: Path) -> Path:
    return write_adapter(folder, dict(read_checkpoint(source_of(case)).config or {}))


def _graph_logits(folder: Path, vocabulary: int) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    tokens = np.arange(24).reshape(2, 12) % vocabulary
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds |= {"position_ids": np.arange(12)[None].repeat(2, 0)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = [
                2 if i == 0 else size if isinstance(size, int) else 0 for i, size in enumerate(value.shape)
            ]
            feeds[value.name] = np.zeros(shape, "f4")
    names = {value.name for value in session.get_inputs()}
    found = session.run(["logits"], {name: value for name, value in feeds.items() if name in names})[0]
    return np.asarray(found, "f8")


@pytest.mark.parametrize("case", ["gguf-q8_0", "gguf-q4_k_m"])
def test_a_gguf_base_is_exported_with_its_adapter(case: str, tmp_path: Path) -> None:
    adapter = _adapter(case, tmp_path / "adapter")
    ran = run("onnx", "--base", source_of(case), "--adapter", adapter, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran
    report = json.loads(ran.stdout)["report"]
    assert report["base"]["id"] == "model.gguf"
    assert report["weights"][0]["passed"] and report["weights"][0]["changed"] == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    wanted = unmerged_logits(source_of(case), adapter)
    found = _graph_logits(tmp_path / "out", config["vocab_size"])
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    proof = ["verify", "--base", source_of(case), "--adapter", adapter, "--onnx", tmp_path / "out"]
    assert run(*proof, "--device", "cpu").code == 0


@pytest.mark.parametrize(
    "case",
    ["bnb-nf4", "gptq-4bit-g32", "awq-gemm-g32", "ct-w4a16-g32-sym", "ct-fp8-static-kv-cache", "gguf-q8_0"],
)
def test_a_kept_merge_is_exported_dense(case: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    adapter = _adapter(case, tmp_path / "adapter")
    merging = ["merge", "--base", source_of(case), "--adapter", adapter, "--output", kept]
    assert run(*merging, "--quantized", "keep", "--no-reload-check").code == 0
    ran = run("onnx", "--model", kept, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    wanted = logits(dense_model(kept))
    found = _graph_logits(tmp_path / "out", config["vocab_size"])
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
