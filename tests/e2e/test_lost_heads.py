"""Modules that an adapter trained whole (``modules_to_save``) and whose tensors its file lacks.

Refused like missing vectors.

What counts is what the class has: PEFT names ``classifier`` and ``score`` for every classifier,
and only one exists.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.command import edit_json, only_complaint, run, run_process
from tests.support.adapter_cases import adapterhub
from tests.support.heads import BERT, ENCODER, LLAMA, TIED, Trained, drop, merging, vary
from tests.support.quantized import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")

_BERT = Trained("bert", "BertForSequenceClassification", BERT, ["key", "value"], task_type="SEQ_CLS")
_LLAMA = Trained(
    "llama",
    "LlamaForSequenceClassification",
    LLAMA,
    ["k_proj"],
    task_type="SEQ_CLS",
    base_class="LlamaForCausalLM",
)
_ON_MASKED = Trained(
    "on-masked",
    "BertForSequenceClassification",
    BERT,
    ["key"],
    task_type="SEQ_CLS",
    base_class="BertForMaskedLM",
)
_DISTIL = {
    "vocab_size": 64,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
#: The adapter, what its file loses, and the tensor that the refusal names.
LOST = [
    (_BERT, ["classifier"], "classifier.bias"),
    (_BERT, ["classifier.bias"], "classifier.bias"),
    (Trained("tokens", "BertForTokenClassification", BERT, ["key"], task_type="TOKEN_CLS"), ["classifier"],
     "classifier.bias"),
    (Trained("answers", "BertForQuestionAnswering", BERT, ["key"], task_type="QUESTION_ANS"), ["qa_outputs"],
     "qa_outputs.bias"),
    (_LLAMA, ["score"], "score.weight"),
    (vary(_LLAMA, name="no-task", save=["score"], task_type=None), ["score"], "score.weight"),
    (vary(_BERT, name="bare", base_class="BertModel"), ["classifier.weight"], "classifier.weight"),
    (
        Trained("distilbert", "DistilBertForSequenceClassification", _DISTIL, ["k_lin"], task_type="SEQ_CLS"),
        ["pre_classifier"], "pre_classifier.bias",
    ),
    (Trained("embedding", "LlamaForCausalLM", LLAMA, ["k_proj"], ["lm_head", "embed_tokens"]),
     ["embed_tokens"], "model.embed_tokens.weight"),
    (Trained("tied", "LlamaForCausalLM", TIED, ["k_proj"], ["lm_head", "embed_tokens"]), ["lm_head"],
     "lm_head.weight"),
    (Trained("nested", "RobertaForMaskedLM", ENCODER, ["key"], ["lm_head.dense"]), ["dense"],
     "lm_head.dense.bias"),
    (Trained("masked", "RobertaForMaskedLM", ENCODER, ["key"], ["lm_head"]), ["decoder.weight"],
     "lm_head.decoder.weight"),
    (Trained("norms", "LlamaForCausalLM", LLAMA, ["k_proj"], ["input_layernorm"]), ["layers.1.input"],
     "model.layers.1.input_layernorm.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "lost", "named"), LOST, ids=[f"{case.name}-{lost[0]}" for case, lost, _ in LOST]
)
def test_a_module_trained_whole_must_be_in_the_file(
    tmp_path: Path, case: Trained, lost: list[str], named: str
) -> None:
    folder = case.write(tmp_path)
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0, "complete, it merges"
    assert case.error(folder) < 1e-5
    drop(folder, *lost)
    only_complaint(run("merge", *words, "--output", folder / "no"), 3, named, str(folder / "adapter"))
    assert not (folder / "no").exists()
    only_complaint(run("verify", *words, "--merged", folder / "merged"), 3, named)


def test_allow_missing_leaves_the_head_of_the_base_and_says_so(tmp_path: Path) -> None:
    folder = drop(_BERT.write(tmp_path), "classifier")
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    ran = run("merge", *words, "--output", folder / "merged", "--allow-missing")
    assert ran.code == 0 and "classifier.bias; left as they are" in ran.stdout, ran
    verified = run("verify", *words, "--merged", folder / "merged")
    assert verified.code == 0 and "hooks" in verified.stdout and "PEFT cannot load" in verified.stdout, (
        verified
    )


def test_inspect_lists_the_lost_head(tmp_path: Path) -> None:
    folder = drop(_BERT.write(tmp_path), "classifier")
    ran = run("inspect", folder / "adapter", "--base", folder / "base")
    assert ran.code == 0 and "refused: adapter was trained with classifier" in ran.stdout, ran


def test_the_task_alone_declares_its_head_as_old_peft_saved_it(tmp_path: Path) -> None:
    """PEFT 0.4 to 0.7 saved ``modules_to_save: null`` with the head in the file.

    Today's asks for it all the same.
    """
    folder = _BERT.write(tmp_path)
    edit_json(folder / "adapter" / "adapter_config.json", modules_to_save=None)
    words = (
        *merging(folder),
        "-q",
    )
    assert run(*words).code == 0
    shutil.rmtree(folder / "merged")
    drop(folder, "classifier")
    only_complaint(run(*words), 3, "classifier.bias")


@pytest.mark.parametrize("missing", ["config.json", "class"])
def test_without_a_class_the_stored_names_decide(tmp_path: Path, missing: str) -> None:
    folder = _BERT.write(tmp_path)
    if missing == "class":
        edit_json(folder / "base" / "config.json", model_type="of-nobody", architectures=None)
    else:
        (folder / "base" / missing).unlink()
    words = (
        *merging(folder),
        "-q",
    )
    assert run(*words).code == 0
    drop(folder, "classifier.bias")
    only_complaint(run(*words, "--overwrite"), 3, "classifier.bias")


def test_what_no_class_has_is_not_asked_for(tmp_path: Path) -> None:
    folder = Trained("bert", "BertForMaskedLM", BERT, ["key"], ["score", "nothing", "dropout"]).write(
        tmp_path
    )
    words = ("--base", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged")
    assert run("merge", *words, "-q").code == 0


def test_a_tensor_that_is_in_the_file_under_its_tied_name_is_there(tmp_path: Path) -> None:
    """Inside one copied head the two biases are one parameter."""
    case = Trained("masked", "RobertaForMaskedLM", ENCODER, ["key"], ["lm_head"])
    folder = drop(case.write(tmp_path), "lm_head.decoder.bias")
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0
    assert case.error(folder) < 1e-5
    assert run("verify", *words, "--merged", folder / "merged").code == 0


def test_a_plain_merge_asks_no_class(tmp_path: Path) -> None:
    case = Trained(
        "plain",
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": False},
        ["k_proj"],
        ["lm_head"],
        "CAUSAL_LM",
    )
    folder = case.write(tmp_path)
    words = (
        *merging(folder),
        "--no-reload-check",
    )
    ran = run_process(*words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert ran.code == 0 and "ia3_export.planning.plan" in ran.stderr and "transformers" not in ran.stderr, (
        ran.stderr[-500:]
    )


@pytest.mark.parametrize(
    ("name", "lost", "named"),
    [
        ("roberta_static", "classifier.dense.bias", "classifier.dense.bias"),
        ("bert_classification", "heads.task.4.bias", "classifier.bias"),
        ("bert_masked_lm", "heads.task.3.bias", "cls.predictions.bias"),
        ("gpt2_classification_static", "score.weight", "model_head"),
    ],
)
def test_a_head_of_adapterhub_must_be_whole(tmp_path: Path, name: str, lost: str, named: str) -> None:
    from safetensors.numpy import load_file, save_file

    case = next(case for case in adapterhub() if case.name == name)
    shutil.copytree(case.adapter, tmp_path / "adapter")
    words = (
        "merge",
        "--base",
        case.base,
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "merged",
        "-q",
    )
    assert run(*words).code == 0
    shutil.rmtree(tmp_path / "merged")
    file = tmp_path / "adapter" / "model_head.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    only_complaint(run(*words), 3, named)


def test_a_head_of_adapterhub_shares_the_embedding_of_the_base(tmp_path: Path) -> None:
    """Which its library does not train: without the tied weight nothing is lost."""
    import torch

    case = next(case for case in adapterhub() if case.name == "bert_masked_lm_static")
    shutil.copytree(case.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "pytorch_model_head.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["cls.predictions.decoder.weight"], tensors["cls.predictions.decoder.bias"]
    torch.save(tensors, file)
    words = (
        "merge",
        "--base",
        case.base,
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "merged",
        "-q",
    )
    assert run(*words).code == 0
    del tensors["cls.predictions.bias"]
    torch.save(tensors, file)
    only_complaint(run(*words, "--overwrite"), 3, "cls.predictions.bias")


@pytest.mark.parametrize(
    ("task", "save"), [("SEQ_CLS", None), ("SEQ_CLS", ["word_embeddings"]), (None, ["classifier"])]
)
def test_the_class_is_the_one_with_the_trained_head(
    tmp_path: Path, task: str | None, save: list[str] | None
) -> None:
    """A classifier on a masked-language base that has no pooler.

    By what is absent, the base's own class would fit better.
    """
    folder = vary(_ON_MASKED, task_type=task, save=save).write(tmp_path)
    words = merging(folder)
    ran = run(*words)
    assert ran.code == 0 and "BertForSequenceClassification needs bert.pooler" in ran.stdout, ran
    drop(folder, "classifier")
    only_complaint(run(*words, "--overwrite"), 3, "classifier.bias")


def test_verify_refuses_another_tools_merge_of_a_lost_head(tmp_path: Path) -> None:
    """Into a quantized base only forwards are compared.

    Hooks with the base's head would agree with a merge that has it too.
    """
    import transformers
    from peft import IA3Config, get_peft_model

    base = FIXTURES / "bnb-nf4"
    config = transformers.AutoConfig.from_pretrained(base)
    del config.quantization_config
    live = get_peft_model(
        transformers.AutoModelForCausalLM.from_config(config),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
    )
    live.save_pretrained(tmp_path / "adapter")
    words = ("--base", base, "--adapter", tmp_path / "adapter")
    assert run("merge", *words, "--output", tmp_path / "merged", "-q").code == 0
    (tmp_path / "merged" / "ia3_export.json").unlink()
    assert run("verify", *words, "--merged", tmp_path / "merged").code == 0
    drop(tmp_path, "lm_head")
    only_complaint(run("verify", *words, "--merged", tmp_path / "merged"), 3, "lm_head.weight")


def test_verify_knows_what_allow_unused_dropped(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = _BERT.write(tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    vector = next(key for key in tensors if key.endswith("layer.0.attention.self.key.ia3_l"))
    tensors[vector.replace("layer.0", "layer.7")] = tensors[vector].copy()
    tensors["base_model.model.elsewhere.weight"] = tensors[vector].copy()
    save_file(tensors, file, {"format": "pt"})
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    only_complaint(run("merge", *words, "--output", folder / "merged"), 3)
    assert run("merge", *words, "--output", folder / "merged", "--allow-unused", "-q").code == 0
    ran = run("verify", *words, "--merged", folder / "merged")
    assert ran.code == 0 and "layer.7" in ran.stdout and "elsewhere.weight" in ran.stdout, ran


@pytest.mark.parametrize("save", [["embeddings"], ["lm_head", "lm_head.dense"]], ids="-".join)
def test_copies_in_copies_are_refused(tmp_path: Path, save: list[str]) -> None:
    """PEFT saves the inner ones, which its forward never read, and cannot load its own file."""
    case = Trained("nested", "RobertaForMaskedLM", ENCODER, ["key"], save)
    folder = case.write(tmp_path)
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    only_complaint(
        run("merge", *words, "--output", folder / "merged"),
        3,
        f"match {save[0].replace('emb', 'roberta.emb')}",
    )
    whole = vary(case, save=[save[0].replace("emb", "roberta.emb")])
    folder = whole.write(tmp_path / "whole")
    words = ("--base", folder / "base", "--adapter", folder / "adapter")
    assert run("merge", *words, "--output", folder / "merged", "-q").code == 0
    assert whole.error(folder) < 1e-5
