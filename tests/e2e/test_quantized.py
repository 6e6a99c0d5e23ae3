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


@pytest.mark.versions
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
    # the library's own 16-bit products, and for 8 bits its quantized activations, are all that is
    # between them
    assert np.linalg.norm(found - wanted) < 0.25 * effect


@pytest.mark.versions
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


@pytest.mark.versions
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
        "merge",
        "--base",
        FIXTURES / "bnb-nf4",
        "--adapter",
        adapter_for("bnb-nf4"),
        "--output",
        tmp_path / "out",
        "--quantized",
        "keep",
        "--dtype",
        "float32",
    )
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
            "merge",
            "--base",
            tmp_path / "base",
            "--adapter",
            adapter,
            "--output",
            tmp_path / how,
            "--quantized",
            how,
            "--link",
            "--json",
        )
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
        "onnx",
        "--base",
        FIXTURES / "bnb-nf4",
        "--adapter",
        adapter_for("bnb-nf4"),
        "--output",
        tmp_path / "out",
        "-q",
    )
    assert ran.code == 0, ran
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()


def _with_head(case: str, adapter: Path, folder: Path, module: str) -> Path:
    """`adapter` that also brings the whole weight of `module`, as ``modules_to_save`` makes PEFT write it."""
    import torch
    from peft import IA3Config, get_peft_model

    model = dense_model(FIXTURES / case).float()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    targets, feedforward = settings["target_modules"], settings["feedforward_modules"]
    live = get_peft_model(
        model,
        IA3Config(target_modules=targets, feedforward_modules=feedforward, modules_to_save=[module]),
    )
    torch.manual_seed(1)
    for key, parameter in live.named_parameters():
        if "ia3_l" in key:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        elif "modules_to_save" in key:
            parameter.data = parameter.data + 0.02 * torch.randn_like(parameter)
    live.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", ["bnb-nf4", "gptq-4bit-g32", "ct-fp8-tensor"])
@pytest.mark.parametrize("module", ["up_proj", "gate_proj", "lm_head"])
def test_an_adapter_that_brings_a_weight_of_the_feed_forward(
    case: str, module: str, adapter_for: Any, tmp_path: Path
) -> None:
    adapter = _with_head(case, adapter_for(case), tmp_path / "adapter", module)
    _merge(case, adapter, tmp_path / "out", "--quantized", "keep")
    found, wanted = logits(dense_model(tmp_path / "out")), unmerged_logits(FIXTURES / case, adapter)
    assert np.linalg.norm(found - wanted) < 4e-3 * np.linalg.norm(wanted)  # the brought weight is in 16 bits
    proof = ["verify", "--base", FIXTURES / case, "--adapter", adapter, "--merged", tmp_path / "out"]
    assert run(*proof).code == 0


@pytest.mark.parametrize("case", ["bnb-nf4-double", "ct-fp8-tensor"])
def test_a_combination_is_not_rounded_to_the_dtype_of_dense_weights(
    case: str, adapter_for: Any, tmp_path: Path
) -> None:
    config = json.loads((FIXTURES / case / "config.json").read_text())
    second = write_adapter(tmp_path / "second", config, seed=1)
    both = ["--adapter", adapter_for(case), "--adapter", second]
    weights = ["--combine", "linear", "--weights", "0.7,0.3"]
    ran = run(
        "merge",
        "--base",
        FIXTURES / case,
        *both,
        *weights,
        "--quantized",
        "keep",
        "--output",
        tmp_path / "out",
    )
    assert ran.code == 0, ran
    ran = run("verify", "--base", FIXTURES / case, *both, "--merged", tmp_path / "out", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.stdout)["steps"][0]["distance"]["max_error"] < 1e-5


def test_a_kept_merge_without_its_configuration_is_no_merge(adapter_for: Any, tmp_path: Path) -> None:
    _merge("bnb-nf4", adapter_for("bnb-nf4"), tmp_path / "out", "--quantized", "keep")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    ran = run(
        "verify",
        "--base",
        FIXTURES / "bnb-nf4",
        "--adapter",
        adapter_for("bnb-nf4"),
        "--merged",
        tmp_path / "out",
        "--weights-only",
    )
    assert ran.code == 1 and "quantization_config" in ran.stdout


def _state(key: str, value: Any) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(tensors[name].tobytes()) | {key: value}
        tensors[name] = np.frombuffer(json.dumps(state).encode(), "u1")

    return change


def _tensor(name: str, value: Any) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"model.layers.0.mlp.{name}"] = value

    return change


@pytest.mark.parametrize("how", ["keep", "dequantize"])
@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("bnb-nf4", _state("blocksize", 0)),
        ("bnb-nf4", _state("blocksize", 2**40)),
        ("bnb-nf4", _state("blocksize", 10**30)),
        ("bnb-nf4", _state("shape", [2**40, 2**40])),
        ("bnb-nf4", _state("shape", [-192, -128])),
        ("bnb-nf4", _state("shape", "large")),
        ("bnb-nf4-double", _state("nested_offset", [1, 2])),
        ("bnb-nf4-double", _state("nested_blocksize", 0)),
        ("bnb-int8", _tensor("up_proj.SCB", np.ones(3, "f4"))),
        ("gptq-act-order", _tensor("up_proj.g_idx", np.full(128, 99, "i4"))),
        ("gptq-4bit-g32", _tensor("up_proj.scales", np.ones((3, 192), "f2"))),
        ("awq-gemm-g32", _tensor("up_proj.scales", np.ones((0, 192), "f2"))),
        ("ct-w4a16-g32-asym", _tensor("up_proj.weight_zero_point", np.ones((1, 1), "i4"))),
        ("ct-w4a16-g32-fp16", _tensor("up_proj.weight_scale", np.ones((192, 3), "f2"))),
        ("ct-w4a16-g32-sym", _tensor("up_proj.weight_shape", np.array([-1, 2**60]))),
        ("hqq-4bit-axis1-g64", _tensor("up_proj.scale", np.ones((192, 1), "i4"))),
        ("hqq-4bit-axis1-g64", _tensor("up_proj.shape", np.array([-96, -64]))),
        ("quanto-qint8", _tensor("up_proj.weight._scale", np.ones((5, 1), "f2"))),
    ],
)
def test_damaged_codes_are_an_error_and_leave_nothing(
    how: str, case: str, change: Any, adapter_for: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    base = shutil.copytree(FIXTURES / case, tmp_path / "base")
    tensors = load_torch(base / "model.safetensors")
    raw = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    change(raw)
    tensors |= {name: torch.from_numpy(np.array(value)) for name, value in raw.items()}
    save_torch(tensors, base / "model.safetensors", {"format": "pt"})
    ran = run(
        "merge",
        "--base",
        base,
        "--adapter",
        adapter_for(case),
        "--output",
        tmp_path / "out",
        "--quantized",
        how,
    )
    only_complaint(ran, 3)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_would_never_end_is_refused_by_name(adapter_for: Any, tmp_path: Path) -> None:
    base = shutil.copytree(FIXTURES / "ct-fp8-tensor", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    group = next(iter(config["quantization_config"]["config_groups"].values()))
    group["targets"] = ["re:(.*.*.*.*)*$x", "Linear"]
    (base / "config.json").write_text(json.dumps(config))
    ran = run("inspect", adapter_for("ct-fp8-tensor"), "--base", base, "--json")
    first = json.loads(ran.stdout)["plan"]["refusals"][0]["error"]
    assert ran.code == 0 and "(.*.*.*.*)*$x" in first and "within 2 seconds" in first
