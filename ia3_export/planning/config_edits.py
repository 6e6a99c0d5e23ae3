"""What a merge changes in ``config.json``: architecture, labels, vocabulary, ties, dtype. Nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import IA3ExportError, Refused
from ia3_export.models.model_class import RuntimeModel
from ia3_export.planning.placement import Resolution


def edit_config(
    resolutions: Sequence[Resolution],
    stored: Checkpoint,
    dtype: str,
    adjusted: Mapping[str, Any] | None,
    warnings: list[str],
) -> tuple[dict[str, Any] | None, list[str]]:
    """The smallest edit of ``config.json`` that makes it true of the output, and what it changes.

    `dtype` is the ``--dtype`` option, or the dtype that the output has where the base's was none of a dense
    model; `adjusted` is the configuration to start from (other quantization settings, or none). What a user
    should know is added to `warnings`.
    """
    if stored.config is None or adjusted is None:
        return None, []
    config = dict(adjusted)
    for result in resolutions:
        runtime = result.runtime
        if runtime is None:
            continue
        labels = adopt_heads(config, runtime, stored.config).get("id2label")
        if labels is not None and not result.adapter.labels:
            warnings.append(
                "the adapter carries no label names: config.json calls them LABEL_0 to "
                f"LABEL_{len(labels) - 1}, in the order of training"
            )
        brings_head = any(runtime.stored.get(name) is None for name in result.extras)
        if brings_head and config.get("architectures") != [runtime.class_name]:
            config["architectures"] = [runtime.class_name]
        if result.untied:
            if can_untie(result, stored):
                config = _untie(config)
            else:
                warnings.append(
                    f"{runtime.class_name} reads tie_word_embeddings for more than the tie, so it is left "
                    "as it is; transformers 5 keeps the two tensors apart because they differ, "
                    "transformers 4 would tie them"
                )
    if dtype != "auto":
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = dtype
    edits = [
        f"{key}: {_shown(stored.config.get(key, 'absent'))} -> {_shown(value)}"
        for key, value in config.items()
        if stored.config.get(key, ...) != value
    ]
    edits += [f"{key}: removed" for key in stored.config if key not in config]
    return (config if edits else None), edits


def adopt_heads(
    config: dict[str, Any], runtime: RuntimeModel, base_config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Put into `config` what the heads and embeddings of an adapter change in `base_config`; returns that."""
    adopted = {key: value for key, value in runtime.config.items() if base_config.get(key) != value}
    config.update(adopted)
    if "id2label" in adopted:
        config.pop("num_labels", None)
    return adopted


def output_class(resolutions: Sequence[Resolution]) -> str | None:
    """The class that the output is for, if a class was asked.

    That of the last adapter with a head that the base has not.
    """
    asked = [(result, result.runtime) for result in resolutions if result.runtime is not None]
    heads = [
        runtime
        for result, runtime in asked
        if any(runtime.stored.get(name) is None for name in result.extras)
    ]
    runtimes = heads[-1:] or [runtime for _, runtime in asked]
    return runtimes[0].class_name if runtimes else None


def _shown(value: Any) -> str:
    return f"{{{len(value)} entries}}" if isinstance(value, dict) else repr(value)


def check_vocabulary(
    resolutions: Sequence[Resolution],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any] | None,
) -> list[IA3ExportError]:
    """The refusals of an output whose vocabulary or labels were resized so that the class does not fit.

    Every tensor of the output (its `shapes` by stored name) must have the size that the class then gives it.
    """
    found: list[IA3ExportError] = []
    for result in resolutions:
        runtime = result.runtime
        if runtime is None or base_config is None:
            continue
        embeddings = (runtime.input_embedding, runtime.output_embedding)
        resized = {key for key, value in runtime.config.items() if base_config.get(key) != value}
        for entry in runtime.shapes if resized else ():
            shape = shapes.get(runtime.stored.get(entry, entry)) if entry not in runtime.converted else None
            if shape is not None and shape != runtime.shapes[entry]:
                found.append(
                    Refused(
                        f"the adapter's vocabulary or labels make {entry} {list(runtime.shapes[entry])}, "
                        f"but the base's {list(shape)} is not replaced",
                        hint="save the adapter with save_embedding_layers=True"
                        if entry in embeddings
                        else "the adapter file is incomplete: save it again from the training run",
                    )
                )
    return found


def can_untie(result: Resolution, stored: Checkpoint) -> bool:
    """Whether ``tie_word_embeddings`` may be set to false without changing anything else."""
    from ia3_export.models.answers import same_but_untied

    config = result.runtime.config if result.runtime is not None else stored.config or {}
    return same_but_untied(config, _untie(config))


def _untie(config: Mapping[str, Any]) -> dict[str, Any]:
    edited: dict[str, Any] = {}
    for key, value in config.items():
        edited[key] = _untie_nested(value)
    edited["tie_word_embeddings"] = False
    return edited


def _untie_nested(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: False if k == "tie_word_embeddings" else _untie_nested(v) for k, v in value.items()}
