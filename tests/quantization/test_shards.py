"""Shards of a quantized base: what is left of them is found by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ia3_export.checkpoint.folder import read_checkpoint
from tests.e2e.command import run
from tests.support.quantized import FIXTURES, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def _sharded(case: str, folder: Path, second: str) -> Path:
    """`case` in two shards, the second with the tensors that end in `second` (one shard, if none does)."""
    folder.mkdir()
    tensors = load_file(FIXTURES / case / "model.safetensors")
    parts = [{n: t for n, t in tensors.items() if n.endswith(second) == last} for last in (False, True)]
    parts = [part for part in parts if part]
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((FIXTURES / case / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("how", ["dequantize", "keep"])
@pytest.mark.parametrize(
    ("case", "second"),
    [
        ("gptq-4bit-g32", (".scales", ".qzeros", ".g_idx")),
        ("gptq-4bit-g32", ".none"),
        ("bnb-nf4-double", (".nested_absmax", ".nested_quant_map")),
    ],
    ids=["scales apart", "one shard", "nested apart"],
)
def test_what_is_left_of_the_shards_is_found(case: str, second: Any, how: str, tmp_path: Path) -> None:
    import transformers

    base = _sharded(case, tmp_path / "base", second)
    config = json.loads((base / "config.json").read_text())
    adapter = write_adapter(tmp_path / "adapter", config)
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out", "--quantized", how)
    assert ran.code == 0, ran
    out = tmp_path / "out"
    found = sorted(path.name for path in out.glob("*.safetensors"))
    index = out / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"].values()) == set(found)
    else:
        assert found == ["model.safetensors"]
    assert read_checkpoint(out).tensors
    if how == "dequantize":
        _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    proof = run("verify", "--base", base, "--adapter", adapter, "--merged", out, "--weights-only")
    assert proof.code == 0, proof


@pytest.mark.parametrize("case", ["gptq-4bit-g32", "auto-round-gptq", "ct-fp8-static"])
def test_a_dense_output_has_no_files_of_the_quantizer(case: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (FIXTURES / case).iterdir():
        if path.name != "expected.npz":
            (base / path.name).write_bytes(path.read_bytes())
    (base / "quant_log.csv").write_text("layer,module,loss\n")
    adapter = write_adapter(tmp_path / "adapter", json.loads((base / "config.json").read_text()))
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert ran.code == 0, ran
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"config.json", "model.safetensors", "README.md", "ia3_export.json", "recipe.json"}
