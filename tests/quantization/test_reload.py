"""The reload check: it fails what is wrong, passes what is right, and says when it could compare nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ia3_export.errors import CheckFailed
from ia3_export.parity.reload_check import check_reload
from tests.e2e.command import run
from tests.support.quantized import FIXTURES, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def _edited(case: str, folder: Path, **entries: Any) -> Path:
    base = shutil.copytree(FIXTURES / case, folder)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | entries))
    return base


def _config(base: Path) -> dict[str, Any]:
    return dict(json.loads((base / "config.json").read_text()))


def _merge(base: Path, adapter: Path, out: Path, *options: str) -> dict[str, Any]:
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", out, "--json", *options)
    assert ran.code == 0, ran
    return dict(json.loads(ran.stdout))


def _with_head(base: Path, folder: Path) -> Path:
    """A classification adapter: vectors, and a head that the causal model lacks."""
    import transformers
    from peft import IA3Config, get_peft_model

    from ia3_export.models.model_class import make_config

    config = make_config(_config(base))
    config.num_labels = 3
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    live = get_peft_model(model, IA3Config(task_type="SEQ_CLS"))
    for key, parameter in live.named_parameters():
        if "ia3_l" in key:
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape)
    live.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", ["gptq-4bit-g32", "auto-round-gptq"])
def test_dense_tensors_in_another_dtype_than_the_configuration_s(case: str, tmp_path: Path) -> None:
    base = _edited(case, tmp_path / "base", dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = tensor.float() + 1e-4
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = tensor.clone()
            tensors[name][0, 0] = 1.01e-7  # a subnormal of float16
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    manifest = _merge(base, write_adapter(tmp_path / "adapter", _config(base)), tmp_path / "out")
    assert manifest["reload"]["weights"] > 10 and manifest["reload"]["error"] == 0


def test_biases_of_zeros_that_the_class_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ gives every projection one."""
    base = _edited("gptq-4bit-g32", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name.replace("scales", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", _config(base))
    assert _merge(base, adapter, tmp_path / "out")["reload"]["weights"] > 10
    tensors["model.layers.0.self_attn.o_proj.bias"][3] = 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    ran = run("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "biased")
    assert (
        ran.code == 1 and "unexpected keys in the output: model.layers.0.self_attn.o_proj.bias" in ran.stderr
    )


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("bnb-nf4", "dequantize"),
        ("bnb-nf4", "keep"),
        ("bnb-int8", "keep"),
        ("ct-w4a16-g32-sym", "keep"),
        ("gptq-4bit-g32", "dequantize"),
    ],
)
def test_a_classification_head_on_a_quantized_causal_model(case: str, how: str, tmp_path: Path) -> None:
    import transformers

    adapter = _with_head(FIXTURES / case, tmp_path / "adapter")
    manifest = _merge(FIXTURES / case, adapter, tmp_path / "out", "--quantized", how)
    assert manifest["reload"]["weights"] > 10
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    saved = load_file(adapter / "adapter_model.safetensors")
    head = next(tensor for name, tensor in saved.items() if "score" in name)
    assert torch.equal(model.score.weight, head.to(model.score.weight.dtype))


@pytest.mark.parametrize("listed", [None, ["lm_head"]])
def test_a_head_is_named_among_what_is_not_quantized(listed: list[str] | None, tmp_path: Path) -> None:
    base = _edited("bnb-nf4", tmp_path / "base")
    config = _config(base)
    config["quantization_config"]["llm_int8_skip_modules"] = listed
    (base / "config.json").write_text(json.dumps(config))
    manifest = _merge(base, _with_head(base, tmp_path / "adapter"), tmp_path / "out", "--quantized", "keep")
    assert manifest["reload"]["weights"] > 10


@pytest.mark.parametrize(
    "case",
    ["bnb-fp4", "bnb-int8", "bnb-nf4-double", "gpt2-bnb-nf4", "ct-fp8-block", "ct-int8-w8a8", "ct-mixed",
     "ct-nvfp4", "ct-w3a16-g32", "ct-w4a16-g32-sym"],
)  # fmt: skip
def test_weight_by_weight_finds_what_loading_the_whole_model_does(case: str) -> None:
    streamed, whole = (check_reload(FIXTURES / case, whole=whole) for whole in (False, True))
    assert (streamed.weights, streamed.error) == (whole.weights, whole.error) and streamed.weights > 10


def test_what_transformers_cannot_load_is_checked_all_the_same() -> None:
    """It gives the zero points of compressed-tensors a shape of its own; the library itself reads them."""
    assert check_reload(FIXTURES / "ct-w4a16-g32-asym").weights > 10


@pytest.mark.parametrize("options", [[], ["--reload-check"]], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("case", "entry"), [("bnb-nf4", "llm_int8_skip_modules"), ("ct-w4a16-g32-sym", "ignore")]
)
def test_a_module_that_the_configuration_calls_dense_is_found(
    case: str, entry: str, options: list[str], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", _config(FIXTURES / case))
    _merge(FIXTURES / case, adapter, tmp_path / "out", "--quantized", "keep", *options)
    config = _config(tmp_path / "out")
    config["quantization_config"][entry] = ["lm_head", "model.layers.0.mlp.up_proj"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match="cannot load|up_proj" if options else "up_proj"):
        check_reload(tmp_path / "out", whole=bool(options))


def test_names_that_loading_changes_are_followed(tmp_path: Path) -> None:
    """Names of a file that transformers changes while loading are followed."""
    found = check_reload(_vision_language(tmp_path / "vision"))
    assert found.weights > 10 and not found.skipped


def _vision_language(folder: Path) -> Path:
    """A 4-bit vision-language model, whose names transformers changes while loading."""
    import transformers

    text = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    transformers.LlavaForConditionalGeneration(config).bfloat16().save_pretrained(folder / "dense")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "dense", quantization_config=four, dtype=torch.bfloat16
    )
    quantized.save_pretrained(folder / "quantized")
    return folder / "quantized"
