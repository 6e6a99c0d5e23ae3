"""``verify`` on bases that bitsandbytes quantized.

Dense merges of them, made by bitsandbytes and PEFT themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.command import run
from tests.support import zoo
from tests.support.quantized import FIXTURES, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

WIDE = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64, "n_inner": 128}}


@pytest.fixture(scope="module", params=["llama-nf4", "llama-int8", "gpt2-nf4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (quantized), ``adapter``, ``merged`` (dense, bf16), ``dequantized``."""
    import bitsandbytes
    import torch
    import transformers
    from peft import PeftModel

    name, method = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    kind = zoo.by_name(name)
    kind = replace(kind, config={**kind.config, **WIDE[name]})
    dense = zoo.build(kind, dtype="bfloat16")
    dense.save_pretrained(folder / "dense")
    zoo.adapt(dense, kind).save_pretrained(folder / "adapter")
    settings = {
        "nf4": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }[method]
    cls = getattr(transformers, kind.model_class)
    cls.from_pretrained(folder / "dense", quantization_config=settings, dtype=torch.bfloat16).save_pretrained(
        folder / "base"
    )
    codes = cls.from_pretrained(folder / "base")
    model = cls.from_pretrained(folder / "dense", dtype=torch.float32)
    for path, module in codes.named_modules():
        target = model.get_submodule(path)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        target.weight.data = weight.T.contiguous() if name == "gpt2" else weight.contiguous()
    model.bfloat16().save_pretrained(folder / "dequantized")
    live = PeftModel.from_pretrained(model.float(), folder / "adapter")
    live.merge_and_unload().bfloat16().save_pretrained(folder / "merged")
    return folder


def test_a_dense_merge_is_compared_with_both_references(quantized: Path) -> None:
    inputs = ["--base", quantized / "base", "--adapter", quantized / "adapter", "--device", "cpu"]
    ran = run("verify", *inputs, "--merged", quantized / "merged", "--json")
    assert ran.code == 0, ran
    report = json.loads(ran.stdout)
    (step,) = report["steps"]
    assert report["weights"] == [] and "quantized" in report["warnings"][0]
    assert 0 < step["distance"]["max_error"] < 0.1 * report["reference"]["effect"]
    assert 0 < step["library"]["max_error"] < 0.2 * report["reference"]["effect"]


def test_the_dequantized_base_is_no_merge(quantized: Path) -> None:
    inputs = ["--base", quantized / "base", "--adapter", quantized / "adapter", "--device", "cpu"]
    ran = run("verify", *inputs, "--merged", quantized / "dequantized", "--json")
    assert ran.code == 1, ran
    assert "computes the base" in json.loads(ran.stdout)["steps"][0]["finding"]


def test_a_merge_of_ours_is_proven_bit_for_bit(quantized: Path) -> None:
    inputs = ["--base", quantized / "base", "--adapter", quantized / "adapter", "--device", "cpu"]
    ran = run("verify", *inputs, "--json")
    assert ran.code == 0, ran
    (proof,) = json.loads(ran.stdout)["weights"]
    assert proof["passed"] and proof["changed"] > 0


def test_the_bits_of_another_tool_s_merge_are_not_those_of_ours(quantized: Path) -> None:
    """It rounds twice: to a dense base, and after the merge. So only its forwards can be judged."""
    inputs = [
        "--base",
        quantized / "base",
        "--adapter",
        quantized / "adapter",
        "--merged",
        quantized / "merged",
    ]
    ran = run("verify", *inputs, "--weights-only")
    assert ran.code == 1 and "WRONG" in ran.stdout


@pytest.mark.parametrize("case", ["bnb-nf4-bf16-storage", "bnb-nf4-crossing"])
@pytest.mark.parametrize("how", ["dequantize", "keep-or-dense"])
def test_codes_in_any_storage_are_verified(case: str, how: str, tmp_path: Path) -> None:
    """FSDP-QLoRA stores the codes under a floating dtype.

    bitsandbytes cannot run blocks that cross rows on every CPU.
    """
    base = FIXTURES / case
    adapter = write_adapter(tmp_path / "adapter", json.loads((base / "config.json").read_text()))
    out = tmp_path / "out"
    assert run("merge", "--base", base, "--adapter", adapter, "--output", out, "--quantized", how).code == 0
    ran = run("verify", "--base", base, "--adapter", adapter, "--merged", out, "--device", "cpu", "--json")
    assert ran.code == 0, ran
    report = json.loads(ran.stdout)
    compared = report["steps"][0]["library"]
    if compared is None:
        assert any("bitsandbytes cannot run this base" in warning for warning in report["warnings"])
    else:
        assert compared["max_error"] < 0.1 * report["reference"]["effect"]
    assert compared is not None or case == "bnb-nf4-crossing"


def test_a_forward_of_the_library_that_asserts_is_no_crash(tmp_path: Path) -> None:
    """bitsandbytes' products on a CPU ask by ``assert`` that rows come in blocks of 32.

    The key projection here has 16.
    """
    import torch
    import transformers

    kind = zoo.by_name("gemma2")
    kind = replace(kind, config={**kind.config, "hidden_size": 64, "intermediate_size": 128})
    model = zoo.build(kind, dtype="bfloat16")
    model.save_pretrained(tmp_path / "dense")
    zoo.adapt(model, kind).save_pretrained(tmp_path / "adapter")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    transformers.Gemma2ForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=nf4, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "base")
    inputs = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    assert run("merge", *inputs, "--output", tmp_path / "merged").code == 0
    ran = run("verify", *inputs, "--merged", tmp_path / "merged", "--device", "cpu")
    assert ran.code == 0, ran
