"""All that is asked of optimum: which task a word means, which one a class was made for, and the class to
load for a task.

``TasksManager`` is used as it is; beside each answer stands what it lacks. (``optimum.exporters.tasks``
imports ``requests`` without declaring it: ``pyproject.toml`` does.)
"""

from __future__ import annotations

from typing import Any

#: Tasks with a cache have this ending; our graphs of these tasks always have it.
_CACHED = "-with-past"

#: By the ends of their names, classes that it does not list: T5EncoderModel, DeiTForImageClassification,
#: LayoutLMForQuestionAnswering.
_UNLISTED = {
    "ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification", "ForCTC": "automatic-speech-recognition",
    "Model": "feature-extraction",
}  # fmt: skip


def task_name(word: str) -> str:
    """The task that `word` names, itself or by a synonym; other words stay as they are."""
    from optimum.exporters.tasks import TasksManager

    # it takes this task, which has an output more, for a synonym of feature-extraction
    if word == "sentence-similarity":
        return word
    return str(TasksManager.map_from_synonym(word)).removesuffix(_CACHED)


def task_of_class(cls: type, *, encoder_decoder: bool) -> str:
    """The task that a class of transformers was made for; empty where that is none, or several."""
    from optimum.exporters.tasks import TasksManager

    name = cls.__name__
    if "Heads" in name:
        return ""
    if name.endswith("ForConditionalGeneration"):
        if not encoder_decoder:  # of several modalities
            return ""
        # it files BART's only class with a language-model head under fill-mask
        speech = getattr(cls, "main_input_name", "input_ids") != "input_ids"
        return "automatic-speech-recognition" if speech else "text2text-generation"
    try:
        return str(TasksManager.infer_task_from_model(cls)).removesuffix(_CACHED)
    except (ValueError, KeyError):
        return next((task for end, task in _UNLISTED.items() if name.endswith(end)), "")


def class_for_task(task: str, *, encoder_only: bool) -> Any:
    """transformers' Auto class for a task."""
    from optimum.exporters.tasks import TasksManager

    if task == "automatic-speech-recognition" and encoder_only:
        from transformers import AutoModelForCTC  # its table has both, and it asks for no form

        return AutoModelForCTC
    return TasksManager.get_model_class_for_task(task, framework="pt", library="transformers")
