"""Heads in ``modules_to_save`` that share a weight, a bias or both with the rest.

Merged as PEFT's live model computes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import run
from tests.support.heads import BART, BERT, ENCODER, T5, TIED, Trained, changes, merging, vary

pytestmark = pytest.mark.filterwarnings("ignore")

_SMALL = {**BERT, "embedding_size": 16}
_MOBILE = {**_SMALL, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
_MODERN = {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}
_ROBERTA = Trained("roberta", "RobertaForMaskedLM", ENCODER, ["key"], ["lm_head"])
_TIED = Trained("llama", "LlamaForCausalLM", TIED, ["k_proj"])
CASES = [
    _ROBERTA,
    vary(_ROBERTA, name="roberta-untied", config={**ENCODER, "tie_word_embeddings": False}),
    vary(_ROBERTA, name="roberta-part", save=["lm_head.dense"]),
    vary(_ROBERTA, name="roberta-vector", targets=["key", "decoder"], save=None),
    Trained("bert", "BertForMaskedLM", BERT, ["key"], ["cls"]),
    Trained("bert-decoder", "BertForMaskedLM", BERT, ["key"], ["decoder"]),
    Trained("bert-predictions", "BertForMaskedLM", BERT, ["key"], ["predictions"]),
    Trained("bert-words", "BertForMaskedLM", BERT, ["key"], ["word_embeddings"]),
    Trained("xlm-roberta", "XLMRobertaForMaskedLM", ENCODER, ["key"], ["lm_head"]),
    Trained("albert", "AlbertForMaskedLM", _SMALL, ["key"], ["predictions"]),
    Trained("mpnet", "MPNetForMaskedLM", ENCODER, ["attn.k"], ["lm_head"]),
    Trained("deberta", "DebertaV2ForMaskedLM", BERT, ["key_proj"], ["cls"]),
    Trained(
        "longformer",
        "LongformerForMaskedLM",
        {**BERT, "attention_window": 4, "sep_token_id": 2},
        ["key"],
        ["lm_head"],
    ),
    Trained("mobilebert", "MobileBertForMaskedLM", _MOBILE, ["key"], ["cls"]),
    Trained("modernbert", "ModernBertForMaskedLM", _MODERN, ["Wqkv"], ["head", "decoder"]),
    Trained("electra", "ElectraForMaskedLM", _SMALL, ["key"], ["generator_lm_head"]),
    Trained("electra-end-of-name", "ElectraForMaskedLM", _SMALL, ["key"], ["lm_head"]),
    Trained("bart", "BartForConditionalGeneration", BART, ["k_proj"], ["lm_head"]),
    Trained("bart-shared", "BartForConditionalGeneration", BART, ["k_proj"], ["shared"]),
    Trained("t5", "T5ForConditionalGeneration", T5, ["k"], ["lm_head"]),
    Trained("t5-embeddings", "T5ForConditionalGeneration", T5, ["k"], ["embed_tokens"]),
    vary(_TIED, name="llama-head", save=["lm_head"]),
    vary(_TIED, name="llama-embedding", save=["embed_tokens"]),
    vary(_TIED, name="llama-embedding-and-vector", targets=["k_proj", "lm_head"], save=["embed_tokens"]),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_tied_head_merges_to_the_live_model(tmp_path: Path, case: Trained) -> None:
    folder = case.write(tmp_path)
    ran = run(
        *merging(folder),
        "-q",
    )
    assert ran.code == 0, ran
    assert case.error(folder) < 1e-5


@pytest.mark.parametrize("case", [_ROBERTA, *CASES[-2:]], ids=lambda case: case.name)
@pytest.mark.parametrize("combine", ["product", "delta"])
def test_verify_agrees_by_peft_and_by_hooks(tmp_path: Path, case: Trained, combine: str) -> None:
    folder = case.write(tmp_path)
    words = ["--base", folder / "base", "--adapter", folder / "adapter"]
    words += [] if combine == "product" else ["--combine", "delta", "--weights", "1"]
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0
    ran = run("verify", *words, "--merged", folder / "merged")
    assert (
        ran.code == 0 and ("applied by peft" if combine == "product" else "applied by hooks") in ran.stdout
    ), ran


def test_weights_only_finds_the_bias_of_the_base(tmp_path: Path) -> None:
    """What was written before: the untied bias with the base's bytes."""
    from safetensors.torch import load_file, save_file

    folder = _ROBERTA.write(tmp_path)
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0
    assert changes(folder)["lm_head.decoder.bias"] == "untie"
    file = folder / "merged" / "model.safetensors"
    tensors = load_file(file)
    assert (tensors["lm_head.decoder.bias"] == tensors["lm_head.bias"]).all()
    assert run("verify", *words, "--merged", folder / "merged", "--weights-only").code == 0
    tensors["lm_head.decoder.bias"] = load_file(folder / "base" / "model.safetensors")["lm_head.bias"]
    save_file(tensors, file, {"format": "pt"})
    ran = run("verify", *words, "--merged", folder / "merged", "--weights-only")
    assert ran.code == 1 and "lm_head.decoder.bias" in ran.stdout, ran


@pytest.mark.parametrize("vocabulary", [None, 70])
def test_both_names_in_the_base_follow_what_is_loaded_into_the_shared_parameter(
    tmp_path: Path, vocabulary: int | None
) -> None:
    """Checkpoints of .bin days store both names of a tie; an embedding beside the vectors goes into both."""
    from safetensors.torch import load_file, save_file

    from tests.support.heads import drop

    case = vary(_TIED, vocabulary=70) if vocabulary else vary(_TIED, save=["embed_tokens", "lm_head"])
    folder = case.write(tmp_path)
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    if vocabulary:
        drop(folder, "lm_head.weight")
    words = ("--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged")
    assert run("merge", *words, "-q").code == 0
    assert case.error(folder) < 1e-5
    assert changes(folder)["lm_head.weight"] == "replace"
