"""Static scales of activations grow with the vectors that reach them.

Where that cannot be known, nothing is guessed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.header import read_values
from tests.e2e.command import only_complaint, run
from tests.support.quantized import FIXTURES, dense_model, logits, unmerged_logits

pytestmark = pytest.mark.filterwarnings("ignore")

Maker = Callable[[str, Mapping[str, float]], Path]
LAYER = "model.layers.0"


@pytest.fixture
def adapter(tmp_path: Path) -> Maker:
    """An IA3 adapter of PEFT on the outputs of some projections.

    The largest element of each, the others around one.
    """

    def make(case: str, largest: Mapping[str, float]) -> Path:
        import transformers
        from peft import IA3Config, get_peft_model

        from ia3_export.models.model_class import make_config

        config = json.loads((FIXTURES / case / "config.json").read_text())
        model = transformers.LlamaForCausalLM(make_config(config))
        live = get_peft_model(model, IA3Config(target_modules=list(largest), feedforward_modules=[]))
        generator = torch.Generator().manual_seed(0)
        for key, parameter in live.named_parameters():
            if "ia3_l" in key:
                name = next(name for name in largest if name in key)
                parameter.data = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data.view(-1)[5] = largest[name]
        live.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def _merge(base: Path, adapter: Path, out: Path, quantized: str) -> dict[str, Any]:
    ran = run(
        "merge", "--base", base, "--adapter", adapter, "--output", out, "--quantized", quantized, "--json"
    )
    assert ran.code == 0, ran
    return dict(json.loads(ran.stdout))


def _number(folder: Path, name: str) -> float:
    return float(read_values(read_checkpoint(folder).tensors[f"{LAYER}.{name}"]).reshape(-1)[0])


@pytest.mark.parametrize("largest", [24.0, -24.0, 3.0])
def test_values_reach_the_output_projection(largest: float, adapter: Maker, tmp_path: Path) -> None:
    """compressed-tensors' own forward, which quantizes activations, with a grown scale and the base's."""
    import transformers

    case = FIXTURES / "ct-fp8-static"
    vectors = adapter("ct-fp8-static", {"v_proj": largest})
    manifest = _merge(case, vectors, tmp_path / "out", "keep")
    before, after = (_number(folder, "self_attn.o_proj.input_scale") for folder in (case, tmp_path / "out"))
    assert after == pytest.approx(abs(largest) * before, rel=2**-8)
    assert any("static scales" in warning for warning in manifest["warnings"])
    stale = shutil.copytree(tmp_path / "out", tmp_path / "stale")
    tensors = load_file(FIXTURES / "ct-fp8-static" / "model.safetensors")
    written = load_file(stale / "model.safetensors")
    written[f"{LAYER}.self_attn.o_proj.input_scale"] = tensors[f"{LAYER}.self_attn.o_proj.input_scale"]
    save_file(written, stale / "model.safetensors", {"format": "pt"})
    wanted = unmerged_logits(case, vectors)
    errors = []
    for folder in (tmp_path / "out", stale):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        errors.append(np.linalg.norm(logits(model) - wanted) / np.linalg.norm(wanted))
    assert errors[0] < 0.06
    assert errors[0] < (0.5 * errors[1] if abs(largest) > 4 else 1.05 * errors[1])


def test_the_linear_half_of_a_gated_feed_forward_reaches_the_last_layer(
    adapter: Maker, tmp_path: Path
) -> None:
    case = FIXTURES / "ct-fp8-static"
    _merge(case, adapter("ct-fp8-static", {"up_proj": -5.0}), tmp_path / "out", "keep")
    before, after = (_number(folder, "mlp.down_proj.input_scale") for folder in (case, tmp_path / "out"))
    assert after == pytest.approx(5 * before, rel=2**-8)
    assert _number(case, "self_attn.o_proj.input_scale") == _number(
        tmp_path / "out", "self_attn.o_proj.input_scale"
    )


def test_a_gate_is_refused_or_what_it_feeds_is_dense(adapter: Maker, tmp_path: Path) -> None:
    case, vectors = FIXTURES / "ct-fp8-static", adapter("ct-fp8-static", {"gate_proj": 5.0})
    ran = run(
        "merge", "--base", case, "--adapter", vectors, "--output", tmp_path / "no", "--quantized", "keep"
    )
    only_complaint(ran, 3, "down_proj", "gate_proj", "static scale")
    manifest = _merge(case, vectors, tmp_path / "out", "keep-or-dense")
    outcomes = {site["weight"]: site["outcome"] for site in manifest["quantization"]["sites"]}
    assert outcomes[f"{LAYER}.mlp.down_proj.weight"] == "dense"
    assert outcomes[f"{LAYER}.mlp.gate_proj.weight"] == "exact"
    assert f"{LAYER}.mlp.down_proj.input_scale" not in read_checkpoint(tmp_path / "out").tensors
    error = logits(dense_model(tmp_path / "out")) - unmerged_logits(case, vectors)
    assert np.linalg.norm(error) < 4e-3 * np.linalg.norm(unmerged_logits(case, vectors))


def test_a_dense_value_projection_reaches_it_all_the_same(adapter: Maker, tmp_path: Path) -> None:
    """NVFP4 takes no vector, so that the values become dense; their reader still quantizes activations."""
    case = FIXTURES / "ct-nvfp4-static"
    manifest = _merge(case, adapter("ct-nvfp4-static", {"v_proj": 4.0}), tmp_path / "out", "keep-or-dense")
    assert [site["outcome"] for site in manifest["quantization"]["sites"]] == ["dense"]
    name = "self_attn.o_proj.input_global_scale"
    assert _number(tmp_path / "out", name) == pytest.approx(_number(case, name) / 4)


def test_scales_of_a_cache_grow_with_their_projection(adapter: Maker, tmp_path: Path) -> None:
    case = FIXTURES / "ct-fp8-static-kv-cache"
    _merge(case, adapter(case.name, {"k_proj": -3.0, "v_proj": 2.0}), tmp_path / "out", "keep")
    for name, factor in (("self_attn.k_scale", 3), ("self_attn.v_scale", 2)):
        assert _number(tmp_path / "out", name) == pytest.approx(factor * _number(case, name), rel=2**-8)


def test_what_enters_the_residual_stream_is_warned_of(adapter: Maker, tmp_path: Path) -> None:
    manifest = _merge(
        FIXTURES / "ct-fp8-static", adapter("ct-fp8-static", {"o_proj": 2.0}), tmp_path / "out", "keep"
    )
    assert any("o_proj" in warning and "calibrate again" in warning for warning in manifest["warnings"])
    ran = run(
        "verify",
        "--base",
        FIXTURES / "ct-fp8-static",
        "--adapter",
        tmp_path / "adapter",
        "--merged",
        tmp_path / "out",
        "--device",
        "cpu",
        "--json",
    )
    assert ran.code == 0, ran
    assert any("do not quantize activations" in warning for warning in json.loads(ran.stdout)["warnings"])


@pytest.fixture
def asymmetric(tmp_path: Path) -> Path:
    """int8 with static, asymmetric scales of the inputs, as compressed-tensors names them."""
    base = shutil.copytree(FIXTURES / "ct-int8-w8a8", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        tensors[f"{module}.input_scale"] = torch.tensor([0.02])
        tensors[f"{module}.input_zero_point"] = torch.tensor([-7], dtype=torch.int8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] |= {"dynamic": False, "symmetric": False, "strategy": "tensor"}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_zero_points_of_activations_leave_a_dense_output(
    asymmetric: Path, adapter: Maker, tmp_path: Path
) -> None:
    manifest = _merge(asymmetric, adapter("ct-int8-w8a8", {"v_proj": 2.0}), tmp_path / "out", "dequantize")
    assert not [
        name
        for name in read_checkpoint(tmp_path / "out").tensors
        if "input_scale" in name or "zero_point" in name
    ]
    assert manifest["reload"]["weights"] > 0


def test_nothing_of_a_quantized_cache_is_left_in_a_dense_output(adapter: Maker, tmp_path: Path) -> None:
    base = shutil.copytree(FIXTURES / "ct-fp8-static-kv-cache", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for leaf in ("q_scale", "k_zero_point", "v_zero_point"):
        tensors[f"{LAYER}.self_attn.{leaf}"] = torch.zeros(1)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    manifest = _merge(
        base, adapter("ct-fp8-static-kv-cache", {"k_proj": 2.0}), tmp_path / "out", "dequantize"
    )
    assert manifest["reload"]["weights"] > 10


def test_scales_of_inputs_that_are_not_understood_are_refused(adapter: Maker, tmp_path: Path) -> None:
    """ModelOpt's AWQ multiplies the inputs before it quantizes them: a weight without that is another one."""
    base = shutil.copytree(FIXTURES / "ct-fp8-static", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[f"{LAYER}.mlp.down_proj.pre_quant_scale"] = torch.ones(96)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    vectors = adapter("ct-fp8-static", {"v_proj": 2.0})
    ran = run("merge", "--base", base, "--adapter", vectors, "--output", tmp_path / "out")
    only_complaint(ran, 3, "pre_quant_scale")


@pytest.mark.parametrize("largest", [2.0, -2.0])
def test_a_range_with_a_zero_point_is_not_turned_around(
    largest: float, asymmetric: Path, adapter: Maker, tmp_path: Path
) -> None:
    vectors = adapter("ct-int8-w8a8", {"v_proj": largest})
    if largest > 0:
        _merge(asymmetric, vectors, tmp_path / "out", "keep")
        assert _number(tmp_path / "out", "self_attn.o_proj.input_scale") == pytest.approx(0.04)
        return
    ran = run(
        "merge",
        "--base",
        asymmetric,
        "--adapter",
        vectors,
        "--output",
        tmp_path / "out",
        "--quantized",
        "keep",
    )
    only_complaint(ran, 3, "o_proj.input_zero_point", "negative")
