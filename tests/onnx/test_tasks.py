"""Which task a checkpoint is exported for, by its configuration alone, and the model loaded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ia3_export.errors import Unsupported, UsageError
from ia3_export.onnx.tasks import TASKS, choose_task, load_model
from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore")]


def _config(architecture: str | None, kind: str = "some", *, whole: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": kind, "is_encoder_decoder": whole}
    return config if architecture is None else {**config, "architectures": [architecture]}


INFERRED = [
    ("LlamaForCausalLM", False, "text-generation", "decoder"),
    ("GPT2LMHeadModel", False, "text-generation", "decoder"),
    ("RobertaForCausalLM", False, "text-generation", "decoder"),
    ("BertForMaskedLM", False, "fill-mask", "encoder"),
    ("FunnelForSequenceClassification", False, "text-classification", "encoder"),
    ("MBartForSequenceClassification", True, "text-classification", "encoder"),
    ("ConvBertForTokenClassification", False, "token-classification", "encoder"),
    ("BertForQuestionAnswering", False, "question-answering", "encoder"),
    ("BertModel", False, "feature-extraction", "encoder"),
    ("T5EncoderModel", False, "feature-extraction", "encoder"),
    ("T5ForConditionalGeneration", True, "text2text-generation", "encoder-decoder"),
    ("BartForConditionalGeneration", True, "text2text-generation", "encoder-decoder"),
    ("MarianMTModel", True, "text2text-generation", "encoder-decoder"),
    ("WhisperForConditionalGeneration", True, "automatic-speech-recognition", "encoder-decoder"),
    ("Wav2Vec2ForCTC", False, "automatic-speech-recognition", "encoder"),
    ("ViTForImageClassification", False, "image-classification", "encoder"),
    ("HubertForSequenceClassification", False, "audio-classification", "encoder"),
    ("ASTForAudioClassification", False, "audio-classification", "encoder"),
]


@pytest.mark.parametrize(
    ("architecture", "whole", "name", "form"), INFERRED, ids=[row[0] for row in INFERRED]
)
def test_the_task_of_an_architecture(architecture: str, whole: bool, name: str, form: str) -> None:
    task = choose_task(_config(architecture, whole=whole), asked=None, sentence=False)
    assert (task.name, task.form) == (name, form)


def test_the_first_architecture_counts_and_a_sentence_model_embeds_sentences() -> None:
    config = {"architectures": ["BertForMaskedLM", "BertModel"]}
    assert choose_task(config, asked=None, sentence=False).name == "fill-mask"
    # sentence-transformers saves what it trained as a plain encoder; a head is no part of it
    assert choose_task(config, asked=None, sentence=True).name == "fill-mask"
    config = _config("MPNetModel")
    assert choose_task(config, asked=None, sentence=True).name == "sentence-similarity"
    assert choose_task(config, asked="feature-extraction", sentence=True).name == "feature-extraction"


@pytest.mark.parametrize(
    ("asked", "whole", "name"),
    [
        ("causal-lm", False, "text-generation"),
        ("text-generation-with-past", False, "text-generation"),
        ("masked-lm", False, "fill-mask"),
        ("sequence-classification", False, "text-classification"),
        ("zero-shot-classification", False, "text-classification"),
        ("default", False, "feature-extraction"),
        ("seq2seq-lm", True, "text2text-generation"),
        ("translation", True, "text2text-generation"),
        ("summarization", True, "text2text-generation"),
        ("text2text-generation-with-past", True, "text2text-generation"),
        ("speech2seq-lm", True, "automatic-speech-recognition"),
    ],
)
def test_optimums_names_are_understood(asked: str, whole: bool, name: str) -> None:
    assert choose_task(_config("SomeModel", whole=whole), asked=asked, sentence=False).name == name


@pytest.mark.parametrize(
    "asked", ["", "object-detection", "text-generation-please", "text generation", "Fill-Mask"]
)
def test_other_tasks_are_refused_with_all_there_are(asked: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_task(_config("BertModel"), asked=asked, sentence=False)
    assert asked in str(caught.value) and all(name in caught.value.hint for name in TASKS)


@pytest.mark.parametrize(
    "architecture",
    [
        "DetrForObjectDetection", "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration",
        "BertForMultipleChoice", "GitForCausalLM", "VisionEncoderDecoderModel",
        "TimesformerForVideoClassification", "NobodyKnowsThisModel", None, "Llama4ForConditionalGeneration",
        "GPT2DoubleHeadsModel",
    ],
)  # fmt: skip
def test_an_architecture_without_a_task_is_refused_by_name(architecture: str | None) -> None:
    with pytest.raises(Unsupported) as caught:
        choose_task(_config(architecture), asked=None, sentence=False)
    assert (architecture or "?") in str(caught.value) and "--task" in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "whole", "other"),
    [
        ("text2text-generation", False, "text-generation"),
        ("text-generation", True, "text2text-generation"),
    ],
)
def test_a_task_of_another_form_is_refused_with_the_one_that_fits(
    asked: str, whole: bool, other: str
) -> None:
    with pytest.raises(Unsupported, match="somekind") as caught:
        choose_task(_config("SomeModel", "somekind", whole=whole), asked=asked, sentence=False)
    assert f"--task {other} " in caught.value.hint


def _saved(folder: Path, name: str, *, dtype: str = "float32") -> tuple[Path, dict[str, Any]]:
    import json

    zoo.build(zoo.by_name(name), dtype=dtype).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def test_the_model_is_loaded_in_float32_exactly_in_eval_mode_with_eager_attention(tmp_path: Path) -> None:
    import torch

    folder, config = _saved(tmp_path, "llama", dtype="bfloat16")
    model = load_model(folder, TASKS["text-generation"], config)
    stored = zoo.build(zoo.by_name("llama"), dtype="bfloat16").state_dict()
    assert not model.training and model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, stored[name].float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "task", "class_name"),
    [
        ("bert-masked-lm", "fill-mask", "BertForMaskedLM"),
        ("bert-masked-lm", "feature-extraction", "BertModel"),
        ("bert-seq-cls", "sentence-similarity", "BertModel"),
        ("gpt2", "feature-extraction", "GPT2Model"),
        ("t5", "text2text-generation", "T5ForConditionalGeneration"),
    ],
)
def test_the_class_is_the_checkpoints_own_or_transformers_own_choice(
    tmp_path: Path, name: str, task: str, class_name: str
) -> None:
    folder, config = _saved(tmp_path, name)
    assert type(load_model(folder, TASKS[task], config)).__name__ == class_name


@pytest.mark.parametrize(
    ("name", "task", "absent"),
    [
        ("bert-masked-lm", "text-classification", "classifier.weight"),
        ("bert-masked-lm", "question-answering", "qa_outputs.weight"),
        ("bert-seq-cls", "fill-mask", "cls.predictions.bias"),
        ("bert-masked-lm", "image-classification", "BertConfig"),
        ("gpt2", "token-classification", "classifier.weight"),
        ("dinov2-swiglu", "image-classification", "classifier.weight"),
    ],
)
def test_a_checkpoint_without_the_tasks_head_is_refused(
    tmp_path: Path, name: str, task: str, absent: str
) -> None:
    folder, config = _saved(tmp_path, name)
    with pytest.raises(Unsupported) as caught:
        load_model(folder, TASKS[task], config)
    assert absent in str(caught.value) and "--task" in caught.value.hint
