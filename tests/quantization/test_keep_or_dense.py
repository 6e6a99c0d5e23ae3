"""``--quantized keep-or-dense``.

What becomes dense among quantized weights is named to every library that reads the format.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ia3_export.checkpoint.folder import read_checkpoint
from tests.e2e.command import only_complaint, run
from tests.support.quantized import FIXTURES, dense_model, logits, unmerged_logits, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE = "model.layers.0.self_attn.k_proj"


def _adapter(case: str, folder: Path) -> Path:
    """An adapter with a vector on the keys that float16 scales cannot take."""
    write_adapter(folder, json.loads((FIXTURES / case / "config.json").read_text()))
    vectors = load_file(folder / "adapter_model.safetensors")
    vectors[next(name for name in vectors if "k_proj" in name)].reshape(-1)[3] = 1e-7
    save_file(vectors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _merged(base: Path, adapter: Path, output: Path) -> dict[str, Any]:
    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        adapter,
        "--output",
        output,
        "--quantized",
        "keep-or-dense",
        "--json",
    )
    assert ran.code == 0, ran
    return dict(json.loads(ran.stdout))


def _quantized(folder: Path) -> set[str]:
    return {n.removesuffix(".qweight") for n in read_checkpoint(folder).tensors if n.endswith(".qweight")}


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return dict(found.get("quantization_config", found))


def _by_gptqmodel(settings: dict[str, Any], modules: set[str]) -> set[str]:
    """What GPTQModel takes for quantized: everything but what a negative rule of ``dynamic`` matches."""
    rules = [rule.removeprefix("-:") for rule in settings["dynamic"] if rule.startswith("-:")]
    return {module for module in modules if not any(re.match(rule, module) for rule in rules)}


def _by_optimum(settings: dict[str, Any], modules: set[str]) -> set[str]:
    """What optimum's ``GPTQQuantizer.convert_model`` replaces."""
    ends = [end for block in settings["modules_in_block_to_quantize"] for end in block]
    return {module for module in modules if any(module.endswith(end) for end in ends)}


@pytest.mark.parametrize("case", ["gptq-4bit-g32", "gptq-act-order", "awq-gemm-g32", "auto-round-gptq"])
def test_every_library_is_told_what_is_dense(case: str, tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    adapter = _adapter(case, tmp_path / "adapter")
    manifest = _merged(FIXTURES / case, adapter, tmp_path / "out")
    error = logits(dense_model(tmp_path / "out")) - unmerged_logits(FIXTURES / case, adapter)
    assert np.linalg.norm(error) < 4e-3 * np.linalg.norm(logits(dense_model(tmp_path / "out")))
    staying = _quantized(tmp_path / "out")
    modules = _quantized(FIXTURES / case)
    assert modules - staying == {DENSE}
    settings = _read(tmp_path / "out" / "config.json")
    if case.startswith("gptq"):
        assert _by_gptqmodel(settings, modules) == staying
        assert _by_optimum(settings, modules) == staying
    elif case.startswith("awq"):
        assert _by_gptqmodel(settings, modules) == staying
        patterns = settings["modules_to_not_convert"]
        assert {module for module in modules if should_convert_module(module, patterns)} == staying
    else:
        assert {name for name, own in settings["extra_config"].items() if own["bits"] == 16} == {DENSE}
    for name in ("quantize_config.json", "quantization_config.json"):  # GPTQModel reads it before config.json
        assert (tmp_path / "out" / name).exists() == (FIXTURES / case / name).exists()
        if (FIXTURES / case / name).exists():
            beside = _read(tmp_path / "out" / name)
            changed = {"dynamic", "modules_in_block_to_quantize", "extra_config"} & settings.keys()
            assert changed and {key: beside[key] for key in changed} == {
                key: settings[key] for key in changed
            }
            assert beside.items() >= _read(FIXTURES / case / name).items()
    assert any(f"{DENSE} is dense and what vLLM" in warning for warning in manifest["warnings"])


def test_settings_that_only_a_side_file_has_are_edited_there(tmp_path: Path) -> None:
    base = shutil.copytree(FIXTURES / "gptq-4bit-g32", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    _merged(base, _adapter("gptq-4bit-g32", tmp_path / "adapter"), tmp_path / "out")
    settings = _read(tmp_path / "out" / "quantize_config.json")
    assert _by_gptqmodel(settings, _quantized(base)) == _quantized(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_a_kept_merge_leaves_the_settings_alone(tmp_path: Path) -> None:
    case = FIXTURES / "gptq-4bit-g32"
    adapter = write_adapter(tmp_path / "adapter", json.loads((case / "config.json").read_text()))
    _merged(case, adapter, tmp_path / "out")
    for name in ("config.json", "quantize_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (case / name).read_bytes()


def test_layers_that_differ_are_named_whole() -> None:
    from ia3_export.quantization.config import Mixture, exclude

    modules = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("attn.q", "mlp.fc2")]
    leaving = ["model.layers.1.mlp.fc2"]
    staying = sorted(set(modules) - set(leaving))
    settings = exclude({"quant_method": "gptq"}, Mixture(leaving, staying, ["lm_head", *leaving]))
    assert isinstance(settings, dict)
    assert settings["modules_in_block_to_quantize"] == [
        ["attn.q", "model.layers.0.mlp.fc2", "model.layers.11.mlp.fc2"]
    ]
    assert _by_optimum(settings, set(modules)) == _by_gptqmodel(settings, set(modules)) == set(staying)


@pytest.mark.parametrize("key", ["dynamic", "modules_to_not_convert"])
def test_settings_of_odd_types_are_refused(key: str, tmp_path: Path) -> None:
    base = shutil.copytree(FIXTURES / "awq-gemm-g32", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"][key] = "model.layers"
    (base / "config.json").write_text(json.dumps(config))
    adapter = _adapter("awq-gemm-g32", tmp_path / "adapter")
    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        adapter,
        "--output",
        tmp_path / "out",
        "--quantized",
        "keep-or-dense",
    )
    only_complaint(ran, 3, key)


def test_torchao_s_description_of_what_is_dense(tmp_path: Path) -> None:
    case = FIXTURES / "torchao-float8-tensor"
    adapter = write_adapter(tmp_path / "adapter", json.loads((case / "config.json").read_text()))
    _merged(case, adapter, tmp_path / "out")
    (shard,) = read_checkpoint(tmp_path / "out").shards
    for name in json.loads(shard.metadata["tensor_names"]):
        kind = json.loads(shard.metadata[name])["_type"]
        assert (kind == "Tensor") == any(tensor.name == name for tensor in shard.tensors), name
    assert json.loads(shard.metadata[f"{DENSE}.weight"]) == {"_type": "Tensor"}
