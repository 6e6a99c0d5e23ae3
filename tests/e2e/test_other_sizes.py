"""Adapters with other labels or another vocabulary than the base's.

Merged, verified and exported as they were trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import only_complaint, run
from tests.support.heads import BART, BERT, LLAMA, T5, TIED, Trained, changes, drop, vary

pytestmark = pytest.mark.filterwarnings("ignore")

_BOTH = ["embed_tokens", "lm_head"]
_LLAMA = Trained(
    "untied-both",
    "LlamaForCausalLM",
    {**LLAMA, "tie_word_embeddings": False},
    ["k_proj"],
    _BOTH,
    vocabulary=70,
)
_TIED = vary(_LLAMA, name="tied-both", config=TIED)
_BERT = Trained("2-to-5", "BertForSequenceClassification", BERT, ["key"], task_type="SEQ_CLS", labels=5)
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VOCABULARIES = [
    _LLAMA,
    _TIED,
    *(vary(case, name=f"{case.name[:-5]}-{name}", save=save)
      for case in (_LLAMA, _TIED) for name, save in (("embedding", ["embed_tokens"]), ("none", None))),
    vary(_LLAMA, name="untied-head", save=["lm_head"]),
    vary(_LLAMA, name="smaller", vocabulary=58),
    vary(_TIED, name="smaller-tied", vocabulary=58),
    vary(_LLAMA, name="same", vocabulary=64),
    vary(_TIED, name="vector-on-head", targets=["k_proj", "lm_head"], save=None),
    Trained("gpt2", "GPT2LMHeadModel", _GPT2, ["c_attn"], ["wte"], vocabulary=70),
    Trained("t5", "T5ForConditionalGeneration", T5, ["k"], None, vocabulary=70),
    Trained("bart", "BartForConditionalGeneration", BART, ["k_proj"], None, vocabulary=70),
    Trained("bart-smaller", "BartForConditionalGeneration", BART, ["k_proj"], None, vocabulary=58),
    Trained("bart-head", "BartForConditionalGeneration", BART, ["k_proj"], ["lm_head"], vocabulary=70),
    Trained("t5-untied-head", "T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, ["k"],
            ["lm_head"], vocabulary=70),
    Trained("pegasus-shared", "PegasusForConditionalGeneration", BART, ["k_proj", "lm_head"], ["shared"],
            vocabulary=70),
    Trained("pegasus-embeddings", "PegasusForConditionalGeneration", BART, ["k_proj"],
            ["decoder.embed_tokens"], vocabulary=70),
    Trained("bert", "BertForMaskedLM", BERT, ["key"], None, vocabulary=70),
    Trained("bert-head", "BertForMaskedLM", BERT, ["key"], ["cls"], vocabulary=70),
    Trained("bert-both", "BertForMaskedLM", BERT, ["key"], ["word_embeddings", "decoder"], vocabulary=70),
]  # fmt: skip
LABELS = [
    _BERT,
    vary(_BERT, name="5-to-2", base_config={"num_labels": 5}, labels=2),
    vary(_BERT, name="1-to-3", base_config={"num_labels": 1}, labels=3),
    vary(_BERT, name="3-to-1", base_config={"num_labels": 3}, labels=1),
    vary(_BERT, name="with-vocabulary", vocabulary=70, save=["word_embeddings"]),
    Trained("tokens", "BertForTokenClassification", BERT, ["key"], task_type="TOKEN_CLS", labels=7),
    Trained("decoder", "LlamaForSequenceClassification", LLAMA, ["k_proj"], task_type="SEQ_CLS", labels=3,
            base_class="LlamaForCausalLM"),
]  # fmt: skip


def _words(folder: Path) -> tuple[str | Path, ...]:
    return ("--base", folder / "base", "--adapter", folder / "adapter")


@pytest.mark.parametrize("case", [*VOCABULARIES, *LABELS], ids=lambda case: case.name)
def test_merged_and_verified_as_trained(tmp_path: Path, case: Trained) -> None:
    folder = case.write(tmp_path)
    ran = run("merge", *_words(folder), "--output", folder / "merged")
    assert ran.code == 0, ran
    assert case.error(folder) < 1e-5
    config = json.loads((folder / "merged" / "config.json").read_text())
    if case.labels is None:
        base = json.loads((folder / "base" / "config.json").read_text())
        assert "LABEL_" not in ran.stdout and config.get("id2label") == base.get("id2label")
    else:
        assert len(config["id2label"]) == case.labels
    verified = run("verify", *_words(folder), "--merged", folder / "merged")
    assert verified.code == 0 and "applied by peft" in verified.stdout, verified
    weights = run("verify", *_words(folder), "--merged", folder / "merged", "--weights-only")
    assert weights.code == 0, weights


@pytest.mark.parametrize("case", [_TIED, _BERT, LABELS[-1]], ids=lambda case: case.name)
def test_hooks_hold_the_same(tmp_path: Path, case: Trained) -> None:
    """``delta`` is none of PEFT's combinations."""
    folder = case.write(tmp_path)
    more = ("--combine", "delta", "--weights", "1")
    assert run("merge", *_words(folder), *more, "--output", folder / "merged", "-q").code == 0
    ran = run("verify", *_words(folder), *more, "--merged", folder / "merged")
    assert ran.code == 0 and "applied by hooks" in ran.stdout, ran


@pytest.mark.parametrize("name", ["tied-none", "bart", "bert-head"])
def test_a_base_that_stores_every_name_of_a_tie(tmp_path: Path, name: str) -> None:
    """As checkpoints of ``.bin`` days do.

    transformers cannot compare two such tensors of another size than the model's.
    """
    import torch
    import transformers

    case = next(case for case in VOCABULARIES if case.name == name)
    folder = case.write(tmp_path)
    model = getattr(transformers, case.model_class).from_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    torch.save(
        {name: value.clone() for name, value in model.state_dict().items()},
        folder / "base" / "pytorch_model.bin",
    )
    assert run("merge", *_words(folder), "--output", folder / "merged", "-q").code == 0
    assert case.error(folder) < 1e-5
    ran = run("verify", *_words(folder), "--merged", folder / "merged")
    assert ran.code == 0 and "applied by peft" in ran.stdout, ran


@pytest.mark.parametrize("order", [1, -1])
def test_one_of_several_adapters_brings_the_head(tmp_path: Path, order: int) -> None:
    folder = _BERT.write(tmp_path)
    plain = vary(_BERT, targets=["value"], task_type=None, labels=None).write(tmp_path / "plain")
    adapters = [folder / "adapter", plain / "adapter"][::order]
    words = ["--base", folder / "base", *(word for adapter in adapters for word in ("--adapter", adapter))]
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0
    assert len(json.loads((folder / "merged" / "config.json").read_text())["id2label"]) == 5
    ran = run("verify", *words, "--merged", folder / "merged")
    assert ran.code == 0, ran


@pytest.mark.slow
@pytest.mark.parametrize("case", [_BERT, _TIED], ids=lambda case: case.name)
def test_onnx_of_base_and_adapter(tmp_path: Path, case: Trained) -> None:
    folder = case.write(tmp_path)
    ran = run("onnx", *_words(folder), "--output", folder / "onnx", "-q")
    assert ran.code == 0, ran
    ran = run("verify", *_words(folder), "--onnx", folder / "onnx")
    assert ran.code == 0, ran


def test_the_wrappers_name_alone_is_read(tmp_path: Path) -> None:
    """PEFT's ``X.modules_to_save.weight`` where a script threw the other of the two equal tensors away."""
    from safetensors.numpy import load_file, save_file

    folder = _LLAMA.write(tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    twice = [key for key in tensors if ".modules_to_save." in key]
    assert len(twice) == 2
    for key in twice:
        del tensors[key.replace(".modules_to_save.", ".")]
    save_file(tensors, file, {"format": "pt"})
    assert run("merge", *_words(folder), "--output", folder / "merged", "-q").code == 0
    assert _LLAMA.error(folder) < 1e-5


def test_two_different_tensors_for_one_name_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = _LLAMA.write(tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lm_head.modules_to_save" in key)
    tensors[key] = tensors[key] + 1
    save_file(tensors, file, {"format": "pt"})
    only_complaint(run("merge", *_words(folder), "--output", folder / "merged"), 3, "lm_head.weight", key)


@pytest.mark.parametrize(
    ("case", "lost", "named"),
    [
        (vary(_LLAMA, save=None), "lm_head", "lm_head.weight"),
        (vary(_LLAMA, save=None), "embed_tokens", "model.embed_tokens.weight"),
        (Trained("bert-both", "BertForMaskedLM", BERT, ["key"], ["decoder"], vocabulary=70),
         "word_embeddings", "word_embeddings.weight"),
        (Trained("t5", "T5ForConditionalGeneration", T5, ["k"], ["shared", "lm_head"], vocabulary=70),
         "original_module", "embed_tokens.weight"),
    ],
    ids=["head", "embedding", "tied", "t5-shared"],
)  # fmt: skip
def test_what_is_in_no_file_in_its_new_size_is_refused_by_name(
    tmp_path: Path, case: Trained, lost: str, named: str
) -> None:
    folder = drop(case.write(tmp_path), lost)
    only_complaint(run("merge", *_words(folder), "--output", folder / "merged"), 3, named)
    assert not (folder / "merged").exists()


def test_constants_grow_by_zeros(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    case = next(case for case in VOCABULARIES if case.name == "bart")
    folder = case.write(tmp_path)
    base = load_file(folder / "base" / "model.safetensors")
    base["final_logits_bias"] = base["final_logits_bias"] + 1
    shutil.rmtree(folder / "merged", ignore_errors=True)
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    assert run("merge", *_words(folder), "--output", folder / "merged", "-q").code == 0
    found = load_file(folder / "merged" / "model.safetensors")["final_logits_bias"]
    assert found.tolist() == [[1.0] * 64 + [0.0] * 6]
    assert changes(folder)["final_logits_bias"] == "replace"
    ran = run("verify", *_words(folder), "--merged", folder / "merged")
    assert ran.code == 0, ran
