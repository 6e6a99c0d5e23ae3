"""Folders that other exporters wrote take an adapter: optimum's, and the builder's of onnxruntime-genai."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.command import run
from tests.runtimes.test_optimum import _python
from tests.support import zoo
from tests.support.exported import KINDS

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

EXPORT = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task=sys.argv[3], do_validation=False)
"""
TASKS = {
    "llama": "text-generation-with-past",
    "bert-seq-cls": "text-classification",
    "gpt2": "text-generation-with-past",
}


def refold(folder: Path, base: Path, adapter: Path, output: Path, *more: str | Path) -> dict[str, Any]:
    given = ("--onnx-base", folder, "--adapter", adapter, "--output", output, "--json", *more)
    ran = run("onnx", *given)
    assert ran.code == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)["report"]
    assert report["in_parity"] and report["steps"][0]["effect_present"] == pytest.approx(1, abs=0.02)
    return report


@pytest.mark.parametrize("name", TASKS)
def test_optimum_s_folders_are_refolded_by_name_and_computed_by_the_live_adapter(
    name: str, tmp_path: Path
) -> None:
    python, kind = _python(), KINDS[name]
    zoo.build(kind).save_pretrained(tmp_path / "base")
    zoo.adapt(zoo.build(kind), kind, seed=1).save_pretrained(tmp_path / "adapter")
    given = [str(tmp_path / "base"), str(tmp_path / "optimum"), TASKS[name]]
    subprocess.run([python, "-c", EXPORT, *given], check=True, capture_output=True, timeout=300)
    refold(tmp_path / "optimum", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    sources = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    ran = run("verify", *sources, "--onnx", tmp_path / "out")
    assert ran.code == 0, ran.stdout + ran.stderr


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_builder_s_packed_projections_are_found_by_their_values(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai runs this")
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    _tokenizer(tmp_path / "base")
    targets = ["k_proj", "v_proj", "down_proj"]
    live = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
    )
    for key, parameter in live.named_parameters():
        if "ia3_l" in key:
            parameter.data = 1 + 0.5 * torch.randn_like(parameter)
    live.save_pretrained(tmp_path / "adapter")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "", "-i", tmp_path / "base"]
    more = ["-o", tmp_path / "genai", "-p", precision, "-e", "cpu", "-c", tmp_path / "cache"]
    subprocess.run([*builder, *more], check=True, capture_output=True, timeout=300)
    base = tmp_path / "base"
    report = refold(tmp_path / "genai", base, tmp_path / "adapter", tmp_path / "out", "--base", base)
    assert report["weights"][0]["changed"] == 4  # key and value of a layer are one product with the query
    if precision == "fp32":
        import onnxruntime_genai as og

        model = og.Model(str(tmp_path / "out"))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=12, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([[5, 6, 7, 8]], dtype=np.int32))
        logits = np.array(generator.get_output("logits"))[0, -1]
        wanted = live.eval()(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].detach().numpy()
        np.testing.assert_allclose(logits, wanted, atol=2e-5)
