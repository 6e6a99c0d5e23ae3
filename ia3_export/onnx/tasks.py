"""Which task a checkpoint is exported for, and the model class that goes with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ia3_export.checkpoint.folder import first_class
from ia3_export.errors import Unsupported, UsageError, first_line
from ia3_export.models.sentence import SentenceHead, read_sentence_head
from ia3_export.onnx.optimum_tasks import class_for_task, task_name, task_of_class

Form = Literal["encoder", "decoder", "encoder-decoder"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task by optimum's name: the `form` of its graphs and the `outputs` beside the cache."""

    name: str
    form: Form
    outputs: tuple[str, ...]


_LOGITS = ("logits",)
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("text-generation", "decoder", _LOGITS),
        Task("text2text-generation", "encoder-decoder", _LOGITS),
        Task("automatic-speech-recognition", "encoder-decoder", _LOGITS),
        Task("feature-extraction", "encoder", ("last_hidden_state",)),
        Task("sentence-similarity", "encoder", ("token_embeddings", "sentence_embedding")),
        Task("fill-mask", "encoder", _LOGITS),
        Task("text-classification", "encoder", _LOGITS),
        Task("token-classification", "encoder", _LOGITS),
        Task("question-answering", "encoder", ("start_logits", "end_logits")),
        Task("image-classification", "encoder", _LOGITS),
        Task("audio-classification", "encoder", _LOGITS),
    )
}


def choose_task(config: Mapping[str, Any], *, asked: str | None, sentence: bool) -> Task:
    """The task that was `asked` for, else that of the checkpoint's first architecture.

    `asked` may be any of optimum's names and synonyms; `sentence`: the folder is a
    sentence-transformers model.

    Raises `UsageError` for a task that is not offered, `Unsupported` for an architecture without one.
    """
    if asked is not None:
        task = _asked(asked, config)
        if task.name == "sentence-similarity" and not sentence:
            raise UsageError(
                f"--task {asked} is for sentence-transformers models, which have a modules.json",
                hint="--task feature-extraction exports the encoder alone",
            )
        return task
    name = first_class(config) or "?"
    found = _task_of(name, config)
    if not found:
        raise Unsupported(
            f"{name} is exported for no task by this version",
            hint=f"--task may export a part of it: {', '.join(TASKS)}",
        )
    if found == "feature-extraction" and sentence:
        found = "sentence-similarity"
    return _fitting(found, config)


def sentence_head(folder: Path, task: Task) -> SentenceHead | None:
    """The pooling of a sentence-transformers model in `folder`, for the task whose outputs it makes."""
    return read_sentence_head(folder) if task.name == "sentence-similarity" else None


def load_model(folder: Any, task: Task, config: Mapping[str, Any]) -> Any:
    """The model in float32 and eval mode, eager attention: plain operators that every runtime has.

    Raises `Unsupported` when the checkpoint has no weights for the task's head, or no class fits.
    """
    import torch

    cls = _model_class(task, config)
    try:
        model, info = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Unsupported(
            f"{cls.__name__} does not load this checkpoint: {first_line(error)}",
            hint=f"give another --task: {', '.join(TASKS)}",
        ) from error
    misfits = sorted(name for name, *_ in info["mismatched_keys"])
    if misfits:
        raise Unsupported(
            f"the weights do not have the shapes that config.json says: {', '.join(misfits[:4])}",
            hint="config.json and weights belong together; fetch or merge the model again",
        )
    absent = sorted(info["missing_keys"])
    # a pooler that the outputs do not depend on is made up by transformers, and harmless
    absent = [name for name in absent if "pooler" not in name or "logits" in task.outputs]
    if absent:
        raise Unsupported(
            f"the checkpoint has no weights for {type(model).__name__}: {', '.join(absent[:4])}",
            hint="give the --task that it was trained for, or an adapter that brings the head",
        )
    accepted = inspect.signature(model.forward).parameters
    if {"input_ids", "pixel_values"} <= accepted.keys():
        raise Unsupported(
            f"{type(model).__name__} takes text and images, which is exported by no task of this version",
            hint="export a part of it that is a checkpoint of its own",
        )
    return model.eval()


def _asked(word: str, config: Mapping[str, Any]) -> Task:
    name = task_name(word)
    if name not in TASKS:
        raise UsageError(f"--task {word} is not offered", hint=f"there are {', '.join(TASKS)}")
    return _fitting(name, config)


def _fitting(name: str, config: Mapping[str, Any]) -> Task:
    """Speech recognition by CTC needs an encoder alone; other tasks of two graphs need an encoder-decoder."""
    task = TASKS[name]
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    if name == "automatic-speech-recognition" and not encoder_decoder:
        return Task(name, "encoder", task.outputs)
    if task.form == "encoder-decoder" and not encoder_decoder:
        raise Unsupported(
            f"{name} needs an encoder-decoder, {config.get('model_type')} is none",
            hint="--task text-generation exports decoders",
        )
    if task.form == "decoder" and encoder_decoder:
        raise Unsupported(
            f"{config.get('model_type')} is an encoder-decoder", hint="--task text2text-generation exports it"
        )
    return task


def _task_of(architecture: str, config: Mapping[str, Any]) -> str:
    """The task of a class by its name in transformers; empty where it is none of `TASKS`."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if not isinstance(cls, type):
        return ""
    name = task_of_class(cls, encoder_decoder=bool(config.get("is_encoder_decoder")))
    return name if name in TASKS else ""


def _model_class(task: Task, config: Mapping[str, Any]) -> Any:
    """The checkpoint's own class if it is made for the task, else transformers' Auto class."""
    import transformers

    name = first_class(config) or ""
    wanted = "feature-extraction" if task.name == "sentence-similarity" else task.name
    if _task_of(name, config) == wanted:
        return getattr(transformers, name)
    return class_for_task(wanted, encoder_only=task.form == "encoder")
