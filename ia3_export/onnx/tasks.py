"""Which task a checkpoint is exported for, and the model class that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia3_export.errors import Unsupported, UsageError

#: Tasks of this version, each with its output.
TASKS: Mapping[str, str] = {"feature-extraction": "last_hidden_state", "text-classification": "logits"}


def infer_task(config: Mapping[str, Any]) -> str:
    """The task of a checkpoint by its first architecture. Raises `Unsupported`, naming the tasks there are."""
    name = str((config.get("architectures") or ["?"])[0])
    if name.endswith("ForSequenceClassification"):
        return "text-classification"
    if (
        name.endswith("Model") and "Head" not in name
    ):  # GPT2LMHeadModel, GPT2DoubleHeadsModel are no bare models
        return "feature-extraction"
    raise Unsupported(
        f"{name} is exported for no task by this version",
        hint=f"--task {' or --task '.join(TASKS)} exports its encoder or classifier, if it has one",
    )


def canonical_task(task: str) -> str:
    """optimum's canonical name of a task or synonym. Raises `UsageError` for tasks this version has not."""
    from optimum.exporters.tasks import TasksManager

    name = TasksManager.map_from_synonym(task)
    if name not in TASKS:
        raise UsageError(f"--task {task} is not offered", hint=f"there are {', '.join(TASKS)}")
    return str(name)


def model_class(task: str) -> Any:
    """The transformers Auto class for `task`, as optimum's TasksManager knows it."""
    from optimum.exporters.tasks import TasksManager

    return TasksManager.get_model_class_for_task(task, framework="pt")
