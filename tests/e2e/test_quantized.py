"""Quantized bases through the command line, in the hands of the libraries that their users have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.e2e.command import only_complaint, run
from tests.support.quantized import FIXTURES, dense_model, logits, unmerged_logits, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

KEPT = ["bnb-nf4", "bnb-nf4-double", "bnb-int8", "ct-w4a16-g32-sym", "ct-fp8-tensor", "ct-int8-w8a8"]


@pytest.fixture(scope="module")
def adapter_for(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapters")

    def made(case: str) -> Path:
        config = json.loads((FIXTURES / case / "config.json").read_text())
        return folder / case if (folder / case).exists() else write_adapter(folder / case, config)

    return made


def _merge(case: str, adapter: Path, out: Path, *options: object) -> dict[str, Any]:
    ran = run("merge", "--base", FIXTURES / case, "--adapter", adapter, "--output", out, "--json", *options)
    assert ran.code == 0, ran
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("case", KEPT)
def test_a_kept_merge_runs_in_its_own_library(case: str, adapter_for: Any, tmp_path: Path) -> None:
    import transformers

    manifest = _merge(case, adapter_for(case), tmp_path / "out", "--quantized", "keep")
    assert manifest["reload"]["weights"] > 0 and not manifest["reload"]["skipped"]
    assert "quantization_config" in (tmp_path / "out" / "config.json").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    found, wanted = logits(model.eval()), unmerged_logits(FIXTURES / case, adapter_for(case))
    base = logits(dense_model(FIXTURES / case))
    effect = np.linalg.norm(wanted - base)
    # the library's own 16-bit products, and for 8 bits its quantized activations, are all that is between them
    assert np.linalg.norm(found - wanted) < 0.25 * effect


@pytest.mark.parametrize("case", ["bnb-nf4-double", "gpt2-bnb-nf4", "gptq-act-order", "awq-gemm-g32"])
def test_a_dense_merge_is_an_ordinary_checkpoint(case: str, adapter_for: Any, tmp_path: Path) -> None:
    import transformers

    manifest = _merge(case, adapter_for(case), tmp_path / "out")
    assert manifest["reload"]["error"] == 0 and manifest["reload"]["weights"] > 10
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = config.get("dtype", config.get("torch_dtype"))
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        stored = {file.get_slice(key).get_dtype() for key in list(file.keys())}
    assert stored == {{"float16": "F16", "bfloat16": "BF16"}[name]}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").double()
    found, wanted = logits(model.eval()), unmerged_logits(FIXTURES / case, adapter_for(case))
    assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)  # 16-bit weights


@pytest.mark.parametrize("how", ["keep", "dequantize"])
def test_verify_proves_a_merge_and_finds_damage(how: str, adapter_for: Any, tmp_path: Path) -> None:
    _merge("bnb-nf4", adapter_for("bnb-nf4"), tmp_path / "out", "--quantized", how)
    proof = [
        "verify",
        "--base",
        FIXTURES / "bnb-nf4",
        "--adapter",
        adapter_for("bnb-nf4"),
        "--merged",
        tmp_path / "out",
    ]
    ran = run(*proof, "--json")
    assert ran.code == 0, ran
    report = json.loads(ran.stdout)
    assert report["steps"][0]["library"]["max_error"] < 0.1 * report["reference"]["effect"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight" + (".absmax" if how == "keep" else "")
    weights[name] = weights[name] * np.float16(1.25).astype(weights[name].dtype)
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    ran = run(*proof, "--weights-only")
    assert ran.code == 1 and name in ran.stdout and "times what they must be" in ran.stdout
    assert run(*proof).code == 1


def test_what_cannot_be_kept_leaves_nothing_behind(adapter_for: Any, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "ct-nvfp4", adapter_for("ct-nvfp4")
    ran = run(
        "merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "out", "--quantized", "keep"
    )
    only_complaint(ran, 3, "8-bit floats")
    assert list(tmp_path.iterdir()) == []


def test_keep_has_no_dtype(adapter_for: Any, tmp_path: Path) -> None:
    ran = run(
        "merge", "--base", FIXTURES / "bnb-nf4", "--adapter", adapter_for("bnb-nf4"), "--output", tmp_path / "out",
        "--quantized", "keep", "--dtype", "float32",
    )  # fmt: skip
    only_complaint(ran, 2, "exclude each other")


def test_inspect_says_of_every_site_what_becomes_of_it(adapter_for: Any) -> None:
    ran = run("inspect", adapter_for("gpt2-bnb-int8"), "--base", FIXTURES / "gpt2-bnb-int8", "--json")
    assert ran.code == 0, ran
    sites = {s["weight"]: s for s in json.loads(ran.stdout)["plan"]["quantization"]["sites"]}
    assert sites["transformer.h.0.attn.c_attn.weight"]["outcome"] == "exact"
    dense = sites["transformer.h.0.mlp.c_proj.weight"]
    assert dense["outcome"] == "dense" and "gelu" in dense["reason"]
    ran = run("inspect", adapter_for("ct-w4a16-g32-sym"), "--base", FIXTURES / "ct-w4a16-g32-sym", "-v")
    assert "2 rounded, 1 moved" in ran.stdout and "up_proj.weight_scale" in ran.stdout


def test_an_output_that_transformers_cannot_load_is_exit_1_and_kept_aside(
    adapter_for: Any, tmp_path: Path
) -> None:
    base = shutil.copytree(FIXTURES / "bnb-nf4", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    command = ["merge", "--base", base, "--adapter", adapter_for("bnb-nf4"), "--output", tmp_path / "out"]
    ran = run(*command)
    only_complaint(ran, 1, "transformers")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "model.safetensors").exists()
    assert run(*command, "--no-reload-check").code == 0


def test_a_base_that_its_library_misreads_is_said_to_be_so(adapter_for: Any, tmp_path: Path) -> None:
    """After a forward on some CPUs bitsandbytes saves its scales transposed, and reads them wrongly again."""
    case = "bnb-nf4-damaged"
    manifest = _merge(case, adapter_for(case), tmp_path / "out", "--quantized", "keep")
    assert "base itself is read wrongly" in manifest["reload"]["skipped"]
    manifest = _merge(case, adapter_for(case), tmp_path / "dense")
    assert manifest["reload"]["weights"] > 0 and manifest["reload"]["error"] == 0


def test_shards_keep_their_names_and_the_index_is_true(adapter_for: Any, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file as load_torch

    shutil.copytree(
        FIXTURES / "bnb-nf4-double", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")
    )
    weights = load_torch(FIXTURES / "bnb-nf4-double" / "model.safetensors")
    save_torch_state_dict(weights, tmp_path / "base", max_shard_size=40_000)
    adapter = adapter_for("bnb-nf4-double")
    for how in ("keep", "dequantize"):
        ran = run(
            "merge", "--base", tmp_path / "base", "--adapter", adapter, "--output", tmp_path / how, "--quantized", how,
            "--link", "--json",
        )  # fmt: skip
        assert ran.code == 0, ran
        assert json.loads(ran.stdout)["reload"]["weights"] > 0
        index = json.loads((tmp_path / how / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 1
        assert set(index.values()) == {path.name for path in (tmp_path / "base").glob("*.safetensors")}
        for name, shard in index.items():
            with safe_open(tmp_path / how / shard, "np") as file:
                assert name in set(file.keys())
    ran = run(
        "verify",
        "--base",
        tmp_path / "base",
        "--adapter",
        adapter,
        "--merged",
        tmp_path / "keep",
        "--weights-only",
    )
    assert ran.code == 0, ran


@pytest.mark.parametrize(
    ("name", "dtype", "settings", "says"),
    [
        ("model.layers.0.mlp.up_proj.codebooks", "F16", {"quant_method": "aqlm"}, "codebooks"),
        ("model.layers.0.mlp.up_proj.weight", "I8", {}, "does not read"),
        ("model.layers.0.mlp.up_proj.weight", "U8", {"quant_method": "nobody-knows"}, "does not read"),
    ],
)
def test_codes_that_are_not_understood_are_never_taken_for_weights(
    name: str, dtype: str, settings: dict[str, str], says: str, adapter_for: Any, tmp_path: Path
) -> None:
    base = shutil.copytree(FIXTURES / "bnb-mixed", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    plain = {n: v for n, v in weights.items() if "proj" not in n}
    plain[name] = np.zeros((96, 128), {"F16": "f2", "I8": "i1", "U8": "u1"}[dtype])
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": settings}
    (base / "config.json").write_text(json.dumps(config))
    ran = run("merge", "--base", base, "--adapter", adapter_for("bnb-mixed"), "--output", tmp_path / "out")
    only_complaint(ran, 3, says)


def test_a_wrong_label_is_seen_by_the_zero_points(adapter_for: Any, tmp_path: Path) -> None:
    manifest = _merge("gptq-mislabeled", adapter_for("gptq-mislabeled"), tmp_path / "out")
    assert any("although labelled" in warning for warning in manifest["warnings"])


def test_an_adapter_of_another_base_is_pointed_out(adapter_for: Any, tmp_path: Path) -> None:
    adapter = shutil.copytree(adapter_for("bnb-nf4"), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for named, says in (
        ("someone/other-model", "fit no other weights"),
        ("someone/other-GPTQ", "quantized by gptq"),
        (str(FIXTURES / "gptq-4bit-g32"), "quantized by gptq"),
    ):
        (adapter / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": named})
        )
        ran = run("inspect", adapter, "--base", FIXTURES / "bnb-nf4", "--json")
        assert any(says in warning for warning in json.loads(ran.stdout)["plan"]["warnings"]), named
    for named in (str(FIXTURES / "bnb-nf4"), "someone/bnb-nf4"):
        (adapter / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": named})
        )
        ran = run("inspect", adapter, "--base", FIXTURES / "bnb-nf4", "--json")
        assert not any("trained" in warning for warning in json.loads(ran.stdout)["plan"]["warnings"]), named


def test_a_quantized_base_is_exported_to_onnx(adapter_for: Any, tmp_path: Path) -> None:
    ran = run(
        "onnx", "--base", FIXTURES / "bnb-nf4", "--adapter", adapter_for("bnb-nf4"), "--output", tmp_path / "out", "-q"
    )  # fmt: skip
    assert ran.code == 0, ran
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()
