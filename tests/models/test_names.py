"""Names that differ between adapter and checkpoint, ties, heads: the merge equals the unmerged forward.

Bases and adapters are written by transformers and PEFT; the reference is always the live adapter, not PEFT's
merge, which is wrong in several of these cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ia3_export import merge, plan_merge
from ia3_export.errors import IA3ExportError, MissingVector, Refused, UnusedVector
from tests.support.tensors import read_folder, same

pytestmark = pytest.mark.filterwarnings("ignore")

BERT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
MIXTRAL = Path(__file__).parent.parent / "fixtures" / "mixtral_v4"


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _make(
    tmp: Path,
    base_class: str,
    config: dict[str, Any],
    ia3: dict[str, Any],
    adapter_class: str | None = None,
    edit: Callable[[Path], None] | None = None,
    **labels: Any,
) -> tuple[Path, Path]:
    """A base saved by `base_class`, and an adapter with random vectors trained as `adapter_class` on it."""
    import torch
    from peft import IA3Config, get_peft_model

    torch.manual_seed(0)
    cls = _class(base_class)
    cls(cls.config_class(**config)).save_pretrained(tmp / "base")
    if edit is not None:
        edit(tmp / "base")
    model = _class(adapter_class or base_class).from_pretrained(tmp / "base", **labels)
    tuned = get_peft_model(model, IA3Config(**ia3))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp / "adapter")
    return tmp / "base", tmp / "adapter"


def _inputs(config: dict[str, Any]) -> dict[str, Any]:
    import torch

    ids = torch.arange(3, 23)[None]
    return {"input_ids": ids, "decoder_input_ids": ids[:, :6]} if "d_model" in config else {"input_ids": ids}


def _assert_equals_live(
    base: Path, adapter: Path, output: Path, cls: Any, inputs: dict[str, Any], **labels: Any
) -> dict[str, Any]:
    """The merged folder gives the live adapter's output; returns transformers' loading report."""
    import torch
    from peft import PeftModel

    torch.manual_seed(0)
    live = PeftModel.from_pretrained(cls.from_pretrained(base, **labels), adapter).eval()
    merged, report = cls.from_pretrained(output, output_loading_info=True)
    plain = cls.from_pretrained(base, **labels).eval()
    with torch.no_grad():
        expected, got, before = live(**inputs)[0], merged.eval()(**inputs)[0], plain(**inputs)[0]
    scale = float(expected.abs().max())
    assert float((expected - got).abs().max()) < 1e-5 * scale
    assert before.shape != expected.shape or float((expected - before).abs().max()) > 1e-3 * scale, (
        "no effect"
    )
    return dict(report)


HEADS = [
    ("BertModel", BERT, "BertForSequenceClassification", {"num_labels": 5}, set()),
    ("RobertaForMaskedLM", BERT | {"type_vocab_size": 1, "max_position_embeddings": 64},
     "RobertaForSequenceClassification", {"num_labels": 7}, {"lm_head"}),
    ("LlamaForCausalLM", LLAMA, "LlamaForSequenceClassification", {"num_labels": 4}, {"lm_head"}),
    ("LlamaForCausalLM", LLAMA, "LlamaForTokenClassification", {"num_labels": 3}, {"lm_head"}),
]  # fmt: skip


@pytest.mark.parametrize(("base_class", "config", "head_class", "labels", "unexpected"), HEADS)
def test_a_head_adapter_on_a_base_without_that_head(
    tmp_path: Path,
    base_class: str,
    config: dict[str, Any],
    head_class: str,
    labels: dict[str, int],
    unexpected: set[str],
) -> None:
    task = "TOKEN_CLS" if "Token" in head_class else "SEQ_CLS"
    base, adapter = _make(tmp_path, base_class, config, {"task_type": task}, head_class, **labels)
    merge(base, [adapter], tmp_path / "out")
    report = _assert_equals_live(
        base, adapter, tmp_path / "out", _class(head_class), _inputs(config), **labels
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {
        key.partition(".")[0] for key in report["unexpected_keys"]
    } == unexpected  # the base's own head stays
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [head_class]
    assert len(written["id2label"]) == labels["num_labels"]
    before, after = read_folder(base), read_folder(tmp_path / "out")
    assert set(before) < set(after)


@pytest.mark.parametrize(
    ("base_class", "config", "bare_class"),
    [("BertForMaskedLM", BERT, "BertModel"), ("LlamaForCausalLM", LLAMA, "LlamaModel")],
)
def test_an_adapter_of_the_bare_model_on_a_base_with_a_head(
    tmp_path: Path, base_class: str, config: dict[str, Any], bare_class: str
) -> None:
    base, adapter = _make(tmp_path, base_class, config, {"task_type": "FEATURE_EXTRACTION"}, bare_class)
    merge(base, [adapter], tmp_path / "out")
    _assert_equals_live(base, adapter, tmp_path / "out", _class(bare_class), _inputs(config))
    assert set(read_folder(base)) == set(read_folder(tmp_path / "out"))
    assert (base / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_an_adapter_of_a_head_model_on_a_bare_base(tmp_path: Path) -> None:
    base, adapter = _make(
        tmp_path,
        "LlamaModel",
        LLAMA | {"tie_word_embeddings": True},
        {"task_type": "CAUSAL_LM"},
        "LlamaForCausalLM",
    )
    merge(base, [adapter], tmp_path / "out")
    _assert_equals_live(base, adapter, tmp_path / "out", _class("LlamaForCausalLM"), _inputs(LLAMA))


def test_a_head_that_neither_side_brings_is_pointed_out(tmp_path: Path) -> None:
    base, adapter = _make(
        tmp_path, "BertForMaskedLM", BERT, {"task_type": "SEQ_CLS"}, "BertForSequenceClassification"
    )
    warnings = plan_merge(base, [adapter]).warnings
    assert any("bert.pooler.dense.weight" in warning for warning in warnings)


TIED = [
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}, ["k_proj", "v_proj", "down_proj", "lm_head"],
     ["down_proj"]),
    ("GPT2LMHeadModel", GPT2, ["c_attn", "mlp.c_proj", "lm_head"], ["mlp.c_proj"]),
    ("T5ForConditionalGeneration", T5, ["k", "v", "wo", "lm_head"], ["wo"]),
    ("BartForConditionalGeneration", BART, ["q_proj", "v_proj", "fc2", "lm_head"], ["fc2"]),
    ("BertForMaskedLM", BERT, ["key", "value", "output.dense", "decoder"], ["output.dense"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base_class", "config", "targets", "feedforward"), TIED, ids=[row[0] for row in TIED]
)
def test_a_vector_on_a_tied_head_unties_it(
    tmp_path: Path, base_class: str, config: dict[str, Any], targets: list[str], feedforward: list[str]
) -> None:
    base, adapter = _make(
        tmp_path, base_class, config, {"target_modules": targets, "feedforward_modules": feedforward}
    )
    manifest = merge(base, [adapter], tmp_path / "out")
    report = _assert_equals_live(base, adapter, tmp_path / "out", _class(base_class), _inputs(config))
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert any("untied" in warning for warning in manifest.content["warnings"])
    embedding = {n: t for n, t in read_folder(base).items() if "shared" in n or "embed" in n or "wte" in n}
    after = read_folder(tmp_path / "out")
    assert embedding and all(same(tensor, after[name]) for name, tensor in embedding.items())


def test_a_t5_of_transformers_4_keeps_its_output_scale_when_the_head_is_untied(tmp_path: Path) -> None:
    def forget(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        for key in ("scale_decoder_outputs", "tie_word_embeddings"):
            config.pop(key)
        (base / "config.json").write_text(json.dumps(config))

    ia3 = {"target_modules": ["k", "v", "wo", "lm_head"], "feedforward_modules": ["wo"]}
    base, adapter = _make(tmp_path, "T5ForConditionalGeneration", T5, ia3, edit=forget)
    manifest = merge(base, [adapter], tmp_path / "out")
    _assert_equals_live(base, adapter, tmp_path / "out", _class("T5ForConditionalGeneration"), _inputs(T5))
    assert any("transformers 4 would tie them" in warning for warning in manifest.content["warnings"])


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_embeddings_replace_the_bases(tmp_path: Path, saved: list[str], tied: bool) -> None:
    config = LLAMA | {"tie_word_embeddings": tied}
    base, adapter = _make(
        tmp_path, "LlamaForCausalLM", config, {"task_type": "CAUSAL_LM", "modules_to_save": saved}
    )
    merge(base, [adapter], tmp_path / "out")
    report = _assert_equals_live(base, adapter, tmp_path / "out", _class("LlamaForCausalLM"), _inputs(LLAMA))
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_taken_over(tmp_path: Path, tied: bool) -> None:
    import torch
    from peft import IA3Config, PeftModel, get_peft_model

    cls = _class("LlamaForCausalLM")
    cls(cls.config_class(**LLAMA, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")

    def resized() -> Any:
        torch.manual_seed(3)
        model = cls.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(140)
        return model

    tuned = get_peft_model(resized(), IA3Config(task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    live = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = cls.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(120, 140)[None]
    torch.testing.assert_close(merged(ids).logits, live(ids).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 140


def test_square_conv1d_weights_are_folded_along_the_right_axis(tmp_path: Path) -> None:
    ia3 = {"target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    base, adapter = _make(tmp_path, "GPT2LMHeadModel", GPT2, ia3)
    merge(base, [adapter], tmp_path / "out")
    _assert_equals_live(base, adapter, tmp_path / "out", _class("GPT2LMHeadModel"), _inputs(GPT2))


def test_the_table_of_conv1d_models_is_that_of_transformers() -> None:
    import ast

    import transformers
    from transformers import CONFIG_MAPPING

    from ia3_export.models.modules import CONV1D_MODEL_TYPES

    users = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "Conv1D" not in text:  # which spares parsing some four hundred large files
            continue
        imported = any(
            isinstance(node, ast.ImportFrom) and any(alias.name == "Conv1D" for alias in node.names)
            for node in ast.walk(ast.parse(text))
        )
        if imported:
            users.add(file.parent.name)
    assert {"gpt2", "decision_transformer"} <= users
    known = {name.replace("-", "_") for name in CONV1D_MODEL_TYPES}
    for folder in users:
        types = {t.replace("-", "_") for t in CONFIG_MAPPING if t.replace("-", "_").startswith(folder)}
        assert types & known or folder in known, f"{folder} uses Conv1D"


def test_gamma_and_beta_of_old_checkpoints_stay_as_they_are_named(tmp_path: Path) -> None:
    def age(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        old = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        }
        save_file(old, base / "model.safetensors", metadata={"format": "pt"})

    ia3 = {"task_type": "SEQ_CLS", "modules_to_save": ["LayerNorm"]}
    base, adapter = _make(tmp_path, "BertForSequenceClassification", BERT, ia3, edit=age)
    merge(base, [adapter], tmp_path / "out")
    _assert_equals_live(
        base, adapter, tmp_path / "out", _class("BertForSequenceClassification"), _inputs(BERT)
    )
    before, after = read_folder(base), read_folder(tmp_path / "out")
    assert set(before) == set(after)
    assert not same(before["bert.embeddings.LayerNorm.gamma"], after["bert.embeddings.LayerNorm.gamma"])


@pytest.mark.parametrize("adapter", ["adapter", "adapter_w1"])
@pytest.mark.parametrize("fused", [False, True], ids=["stored per expert", "stored fused"])
def test_expert_vectors_of_transformers_4_are_folded(tmp_path: Path, adapter: str, fused: bool) -> None:
    import torch

    cls = _class("MixtralForCausalLM")
    base = MIXTRAL / "base"
    if fused:
        base = tmp_path / "fused"
        cls.from_pretrained(MIXTRAL / "base").save_pretrained(base, save_original_format=False)
        assert any(name.endswith("experts.down_proj") for name in read_folder(base))
    merge(base, [MIXTRAL / adapter], tmp_path / "out")
    merged, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(MIXTRAL / "expected.safetensors")
    with torch.no_grad():
        got = merged.eval()(input_ids=expected["input_ids"]).logits
    scale = float(expected[adapter].abs().max())
    assert float((got - expected[adapter]).abs().max()) < 1e-5 * scale
    assert float((expected["base"] - expected[adapter]).abs().max()) > 1e-2 * scale


def test_an_expert_without_its_vector_is_refused(tmp_path: Path) -> None:
    tensors = load_file(MIXTRAL / "adapter" / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w2.ia3_l"]
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = (MIXTRAL / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    _class("MixtralForCausalLM").from_pretrained(MIXTRAL / "base").save_pretrained(
        tmp_path / "fused", save_original_format=False
    )
    for base in (MIXTRAL / "base", tmp_path / "fused"):
        problems = plan_merge(base, [tmp_path / "adapter"]).problems
        assert any(isinstance(problem, MissingVector) for problem in problems), base


def _refusal(base: Path, adapter: Path) -> IA3ExportError:
    problems = plan_merge(base, [adapter]).problems
    assert problems
    return problems[0]


def _move(tuned: Any) -> None:
    for name, parameter in tuned.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.25


def test_a_weight_under_weight_norm_is_refused_by_name(tmp_path: Path) -> None:
    import torch
    from peft import IA3Config, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    tuned = get_peft_model(model, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    _move(tuned)  # a vector of ones would change nothing
    tuned.save_pretrained(tmp_path / "adapter")
    normed = torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 8)), torch.nn.Linear(8, 3)
    )
    (tmp_path / "base").mkdir()
    save_file(normed.state_dict(), tmp_path / "base" / "model.safetensors")
    refusal = _refusal(tmp_path / "base", tmp_path / "adapter")
    assert isinstance(refusal, Refused) and "module 0 is parametrized" in str(refusal)


def test_the_output_projection_of_multihead_attention_is_refused_by_name(tmp_path: Path) -> None:
    import torch
    from peft import IA3Config, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.attention(x, x, x)[0])

    model = Model()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    tuned = get_peft_model(
        model, IA3Config(target_modules=["attention.out_proj", "head"], feedforward_modules=[])
    )
    _move(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    refusal = _refusal(tmp_path / "base", tmp_path / "adapter")
    assert isinstance(refusal, Refused) and "MultiheadAttention" in str(refusal)


def test_a_vector_for_a_module_of_another_model_is_refused(tmp_path: Path) -> None:
    base, _ = _make(tmp_path / "a", "LlamaForCausalLM", LLAMA, {"task_type": "CAUSAL_LM"})
    _, adapter = _make(
        tmp_path / "b",
        "BertForMaskedLM",
        BERT,
        {"target_modules": ["key", "value"], "feedforward_modules": []},
    )
    assert isinstance(_refusal(base, adapter), UnusedVector)
