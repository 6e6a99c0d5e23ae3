"""``target_modules: "all-linear"`` as PEFT reads it.

Every Linear and Conv1D but the output layer must have its vector.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.e2e.command import edit_json, only_complaint, run, run_process
from tests.support.heads import BERT, LLAMA, T5, Trained, drop, merging

pytestmark = pytest.mark.filterwarnings("ignore")

_GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = Trained("llama", "LlamaForCausalLM", LLAMA, "all-linear")
#: Adapters of all Linears, and vectors that their files lose one by one.
CASES = [
    (_LLAMA, ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]),
    (Trained("gpt2", "GPT2LMHeadModel", _GPT2, "all-linear"), ["h.0.attn.c_attn", "h.1.mlp.c_proj"]),
    (Trained("llama-seq-cls", "LlamaForSequenceClassification", LLAMA, "all-linear", task_type="SEQ_CLS"),
     ["layers.1.self_attn.k_proj"]),
    (Trained("bert-seq-cls", "BertForSequenceClassification", BERT, "all-linear", task_type="SEQ_CLS"),
     ["pooler.dense"]),
    (Trained("bert-mlm", "BertForMaskedLM", BERT, "all-linear"), ["transform.dense", "layer.0.output.dense"]),
    (Trained("bert-base", "BertForTokenClassification", BERT, "all-linear"), ["classifier"]),
    (Trained("t5", "T5ForConditionalGeneration", T5, "all-linear"),
     ["decoder.block.1.layer.1.EncDecAttention.v"]),
]  # fmt: skip


def _literally(folder: Path, target: object = "all-linear") -> tuple[str | Path, ...]:
    """Put `target` into the configuration, for which PEFT saves the names of the modules.

    Returns the words of a merge.
    """
    edit_json(folder / "adapter" / "adapter_config.json", target_modules=target)
    return (
        *merging(folder),
        "--overwrite",
    )


@pytest.mark.parametrize(("case", "lost"), CASES, ids=[case.name for case, _ in CASES])
def test_every_linear_must_have_its_vector(tmp_path: Path, case: Trained, lost: list[str]) -> None:
    folder = case.write(tmp_path)
    ran = run(*_literally(folder))
    assert ran.code == 0, ran
    assert case.error(folder) < 1e-5
    complete = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    for module in lost:
        drop(folder, f"{module}.ia3_l")
        only_complaint(run(*_literally(folder)), 3, "1 modules", f"{module}")
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(complete)


@pytest.mark.parametrize("target", ["All-Linear", "all_linear", "linear", []])
def test_a_target_that_names_no_module_does_not_switch_the_check_off(tmp_path: Path, target: object) -> None:
    """PEFT's keyword in other letters, and what PEFT takes for an expression that matches nothing."""
    folder = _LLAMA.write(tmp_path)
    assert run(*_literally(folder, target)).code == 0
    drop(folder, "layers.1.mlp.up_proj")
    only_complaint(run(*_literally(folder, target)), 3, "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("unknown", ["class", "configuration"])
def test_without_a_class_the_other_layers_say_what_is_missing(tmp_path: Path, unknown: str) -> None:
    folder = _LLAMA.write(tmp_path)
    if unknown == "class":
        edit_json(folder / "base" / "config.json", model_type="of-nobody", architectures=None)
    else:
        (folder / "base" / "config.json").unlink()
    assert run(*_literally(folder)).code == 0
    drop(folder, "layers.0.mlp.gate_proj")
    only_complaint(run(*_literally(folder)), 3, "model.layers.0.mlp.gate_proj")


def test_what_is_excluded_or_trained_whole_needs_no_vector(tmp_path: Path) -> None:
    folder = _LLAMA.write(tmp_path)
    edit_json(folder / "adapter" / "adapter_config.json", exclude_modules=["q_proj", "layers.0.mlp.up_proj"])
    drop(folder, "q_proj", "layers.0.mlp.up_proj")
    assert run(*_literally(folder)).code == 0
    drop(folder, "layers.1.mlp.up_proj")
    only_complaint(run(*_literally(folder)), 3, "model.layers.1.mlp.up_proj")


def test_inspect_reads_it_with_and_without_a_base(tmp_path: Path) -> None:
    folder = _LLAMA.write(tmp_path)
    _literally(folder)
    count = len(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert f"{count} vectors" in run("inspect", folder / "adapter").stdout
    ran = run("inspect", folder / "adapter", "--base", folder / "base")
    assert ran.code == 0 and "refused" not in ran.stdout, ran


def test_a_complete_decoder_needs_no_class(tmp_path: Path) -> None:
    folder = Trained(
        "llama", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}, "all-linear"
    ).write(tmp_path)
    ran = run_process(*_literally(folder), "--no-reload-check", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert ran.code == 0 and "ia3_export.planning.plan" in ran.stderr and "transformers" not in ran.stderr, (
        ran.stderr[-500:]
    )
