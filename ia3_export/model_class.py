"""What only the model class knows: built on the meta device from ``config.json``, without weights.

Stored names differ from module paths where transformers renames, fuses or splits tensors while loading
(``transformers.core_model_loading``), where a base checkpoint lacks or carries the base-model prefix, and where
tensors are tied. Everything is asked of transformers itself; no remote code runs.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import IA3ExportError, MissingVector, Refused, Unsupported
from ia3_export.fold import Array, Layout

_TASK_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, eq=False)
class RuntimeModel:
    """A transformers model as the adapter saw it, and how the checkpoint's names lead to it.

    `layouts` gives the kind of every module that IA3 can wrap, `shapes` every state-dict entry, `ties` maps
    a tied entry to its source, `needed` are the entries that a checkpoint must hold, `stored` maps a state-dict entry to the one stored tensor it is loaded from unchanged.
    `config` is the configuration that fits the adapter's heads and embeddings. `model` lives on the meta device.
    """

    class_name: str
    config: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    needed: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    stored: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    input_embedding: str | None
    output_embedding: str | None
    model: Any
    state: Mapping[str, Any]
    renamings: Sequence[Any]
    converters: Sequence[Any]


def load_runtime_model(
    config: Mapping[str, Any], adapter: Adapter, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    """The class in which the adapter's module paths exist, tried in this order: the adapter's own record
    (``auto_mapping``), its task type, the base's ``architectures``, the bare model.

    When no class has all of them the one with the most is returned; the caller names what is left over. Among classes
    that have them all, the one that the checkpoint fills best.
    Raises `Unsupported` when transformers has no class for the configuration.
    """
    with _quiet_transformers():
        try:
            return _best_class(config, adapter, tensors)
        except IA3ExportError:
            raise
        except Exception as error:  # a damaged config.json makes transformers fail in any way there is
            raise Unsupported(
                f"transformers cannot build a model from config.json: {type(error).__name__}: {_first_line(error)}",
                hint="check config.json; without a model class the adapter's names must be the stored names",
            ) from error


def _best_class(
    config: Mapping[str, Any], adapter: Adapter, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    best: tuple[tuple[int, int], RuntimeModel] | None = None
    for name in _candidate_classes(config, adapter):
        fitted, model = _fit_config(name, config, adapter)
        runtime = _describe(name, fitted, model, tensors)
        left_over = sum(module not in runtime.layouts for module in adapter.sites)
        left_over += sum(extra not in runtime.shapes for extra in adapter.extras)
        absent = sum(entry not in adapter.extras for entry in absent_entries(runtime))
        if best is None or (left_over, absent) < best[0]:
            best = (left_over, absent), runtime
        if left_over == absent == 0:
            break
    if best is None:
        raise Unsupported(
            f"transformers has no model class for model_type {config.get('model_type')!r}",
            hint="the adapter's module names must be the stored names for such a model; remote code is not run",
        )
    return best[1]


def absent_entries(runtime: RuntimeModel) -> list[str]:
    """What the model needs and the checkpoint has not, by name."""
    present = runtime.stored.keys() | runtime.converted.keys() | runtime.ties.keys()
    return sorted(runtime.needed - present)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def state_entry(runtime: RuntimeModel, stored_name: str) -> tuple[str, bool]:
    """The state-dict entry into which transformers would load a tensor of this stored name, and whether it
    goes through a conversion (fusion, split, transposition) on the way."""
    from transformers.core_model_loading import rename_source_key

    entry, pattern = rename_source_key(
        stored_name, runtime.renamings, runtime.converters, runtime.model.base_model_prefix, runtime.state
    )
    return entry, pattern is not None


def spread(
    runtime: RuntimeModel, name: str, multiplier: Array, tensors: Mapping[str, StoredTensor]
) -> dict[str, Array]:
    """Carry an elementwise `multiplier` of the state-dict entry `name` over to the stored tensors.

    transformers' own loading operations are run on element numbers instead of weights; where the numbers end up
    says which stored element each element of the parameter comes from. Returns a multiplier, flat, per stored
    tensor. Raises `Refused` when the loading computes with the weights instead of moving them.
    """
    if name in runtime.stored:
        return {runtime.stored[name]: multiplier.reshape(-1)}
    sources = runtime.converted[name]
    sizes = {stored: tensors[stored].size for stored in sources}
    numbers = _trace_conversion(runtime, name, tensors)
    if numbers.shape != multiplier.shape or not np.array_equal(numbers, np.floor(numbers)):
        raise Refused(
            f"transformers computes {name} from {', '.join(sources)} while loading, instead of moving elements",
            hint="load the base with transformers, save it again, and merge into that copy",
        )
    flat = np.ones(sum(sizes.values()), multiplier.dtype)
    flat[numbers.reshape(-1).astype("<i8")] = multiplier.reshape(-1)
    parts, start = {}, 0
    for stored, size in sizes.items():
        parts[stored] = flat[start : start + size]
        start += size
    return parts


def fused_multiplier(
    runtime: RuntimeModel, vectors: Mapping[str, tuple[Array, str]]
) -> tuple[dict[str, Array], set[str]]:
    """Multipliers of fused parameters for vectors under per-expert (transformers 4) module paths.

    `vectors` maps module path to (vector, direction). Returns (multiplier per state-dict entry, the module
    paths understood). Raises `MissingVector` when some experts of a fused parameter have vectors and others not.
    """
    import torch
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    converters = runtime.converters
    groups: dict[str, dict[str, list[str]]] = {}
    for module in sorted(vectors, key=dot_natural_key):
        entry, pattern = rename_source_key(
            f"{module}.weight", runtime.renamings, converters, runtime.model.base_model_prefix, runtime.state
        )
        if pattern is not None and entry in runtime.shapes:
            groups.setdefault(entry, {}).setdefault(pattern, []).append(module)
    multipliers: dict[str, Array] = {}
    understood: set[str] = set()
    for entry, by_pattern in groups.items():
        shape = runtime.shapes[entry]
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        for modules in by_pattern.values():
            if len(modules) != shape[0]:
                raise MissingVector(
                    f"{entry} holds {shape[0]} experts, but the adapter has vectors for {len(modules)} of them "
                    f"({modules[0]}, ...)",
                    hint="the adapter file is incomplete",
                )
        multiplier = None
        parts = len(converter.source_patterns)
        for weight_shape in ((shape[1] // parts, shape[2]), (shape[2] // parts, shape[1])):
            inputs = {}
            for pattern in converter.source_patterns:
                modules = by_pattern.get(pattern, [])
                ones = torch.ones(shape[0], *weight_shape, dtype=torch.float64)
                for expert, module in enumerate(modules):
                    vector, direction = vectors[module]
                    if len(vector) != weight_shape[0 if direction == "out" else 1]:
                        break
                    factors = torch.from_numpy(vector.astype("<f8"))
                    ones[expert] *= factors[:, None] if direction == "out" else factors[None, :]
                else:
                    inputs[pattern] = list(ones)
            if len(inputs) == parts:
                result = _convert(runtime, converter, entry, inputs)
                if tuple(result.shape) == shape:
                    multiplier = result
                    break
        if multiplier is not None:
            multipliers[entry] = multiplier
            understood.update(module for modules in by_pattern.values() for module in modules)
    return multipliers, understood


def same_but_untied(config: Mapping[str, Any], edited: Mapping[str, Any]) -> bool:
    """Whether transformers reads `edited` as `config` with nothing but ``tie_word_embeddings`` changed.

    T5 does not: there the flag also decides whether the decoder's output is scaled.
    """
    with _quiet_transformers():
        before, after = make_config(config).to_dict(), make_config(edited).to_dict()
    return bool(_without_ties(before) == _without_ties(after))


def _without_ties(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_ties(v) for k, v in value.items() if k != "tie_word_embeddings"}
    return value


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object for a ``config.json``. Raises `Unsupported` for an unknown model type."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise Unsupported(
            f"transformers does not know model_type {model_type!r}",
            hint="the adapter's module names must be the stored names for such a model; remote code is not run",
        )
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))


def _candidate_classes(config: Mapping[str, Any], adapter: Adapter) -> Iterator[str]:
    import transformers
    from transformers.models.auto import modeling_auto

    names: list[Any] = []
    auto_mapping = adapter.config.get("auto_mapping")
    if isinstance(auto_mapping, dict):
        names.append(auto_mapping.get("base_model_class"))
    tables = [_TASK_TABLES.get(adapter.task_type or ""), "MODEL_MAPPING_NAMES"]
    model_type = config.get("model_type")
    of_task, bare = (getattr(modeling_auto, t).get(model_type) if t else None for t in tables)
    names += [of_task, *(config.get("architectures") or ()), bare]
    for name in dict.fromkeys(n[0] if isinstance(n, tuple | list) else n for n in names):
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            continue
        if _class_config(name, config) is not None:
            yield name


def _class_config(name: str, config: Mapping[str, Any]) -> Any | None:
    """The configuration object that the class `name` takes: the whole, or its text part; None if neither fits."""
    import transformers

    made = make_config(config)
    wanted = getattr(transformers, name).config_class or object
    return next((c for c in (made, getattr(made, "text_config", None)) if isinstance(c, wanted)), None)


def _build(name: str, config: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, name)(_class_config(name, config)).eval()


def _fit_config(name: str, config: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Any], Any]:
    """The configuration with the number of labels and the vocabulary that the adapter's own tensors have."""
    fitted = dict(config)
    model = _build(name, fitted)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    misfits = {
        extra: tensor.shape
        for extra, tensor in adapter.extras.items()
        if extra in shapes and shapes[extra] != tensor.shape
    }
    if not misfits:
        return fitted, model
    embeddings = {_embedding_name(model, which) for which in ("input", "output")}
    for extra, shape in misfits.items():
        if extra in embeddings and shape[1:] == shapes[extra][1:]:
            _set_vocabulary(fitted, shapes[extra][0], shape[0])
    for labels in dict.fromkeys(shape[0] for extra, shape in misfits.items() if extra not in embeddings):
        labelled = fitted | {
            "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
            "label2id": {f"LABEL_{i}": i for i in range(labels)},
        }
        labelled.pop("num_labels", None)
        trial = _build(name, labelled)
        now = trial.state_dict()
        if all(e in embeddings or tuple(now[e].shape) == shape for e, shape in misfits.items()):
            return labelled, _build(name, labelled)
    return fitted, _build(name, fitted)


def _set_vocabulary(config: dict[str, Any], old: int, new: int) -> None:
    for key, value in config.items():
        if key == "vocab_size" and value == old:
            config[key] = new
        elif isinstance(value, dict) and value.get("vocab_size") == old:
            config[key] = value | {"vocab_size": new}
    if not any(isinstance(v, dict) and "vocab_size" in v for v in config.values()):
        config["vocab_size"] = new


def _embedding_name(model: Any, which: str) -> str | None:
    try:
        module = model.get_input_embeddings() if which == "input" else model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    for path, candidate in model.named_modules():
        if candidate is module:
            return f"{path}.weight"
    return None


def _describe(
    name: str, config: Mapping[str, Any], model: Any, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    from torch import nn
    from transformers.core_model_loading import rename_source_key
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type, Layout], ...] = (
        (nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Conv2d, "conv"), (nn.Conv3d, "conv"),
    )  # fmt: skip
    layouts: dict[str, Layout] = {}
    for path, module in model.named_modules():
        for cls, layout in kinds:
            if isinstance(module, cls):
                layouts[path] = layout
    state = model.state_dict()
    renamings, converters = _conversions(model)
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    for key in tensors:
        entry, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if entry not in state and key in state:
            entry, pattern = key, None
        if entry not in state:
            continue
        if pattern is None:
            stored[entry] = key
        else:
            converted.setdefault(entry, []).append(key)
    runtime = RuntimeModel(
        name, config, layouts, _needed(model, state), {key: tuple(value.shape) for key, value in state.items()},
        dict(model.get_expanded_tied_weights_keys(all_submodels=True)), stored, {},
        _embedding_name(model, "input"), _embedding_name(model, "output"), model, state, renamings, converters,
    )  # fmt: skip
    every: dict[str, tuple[str, ...]] = {}
    for entry, keys in converted.items():
        for target in _convert_stored(runtime, entry, keys, tensors, meta=True):
            every[target] = tuple(keys)
    return replace(runtime, converted=every)


def _needed(model: Any, state: Mapping[str, Any]) -> frozenset[str]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return frozenset(
        name for name in state if name in parameters and not any(pattern.search(name) for pattern in ignored)
    )


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def _convert_stored(
    runtime: RuntimeModel, entry: str, keys: Sequence[str], tensors: Mapping[str, StoredTensor], *, meta: bool
) -> dict[str, Any]:
    """Run the loading operations of `entry` on element numbers (or, `meta`, on shapes alone)."""
    import torch
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    converters = runtime.converters
    inputs: dict[str, list[Any]] = {}
    first = 0
    numbered = {}
    for key in keys:
        count, shape = tensors[key].size, tensors[key].shape
        if meta:
            numbered[key] = torch.empty(shape, dtype=torch.float64, device="meta")
        else:
            numbered[key] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    for key in sorted(keys, key=dot_natural_key):
        _, pattern = rename_source_key(
            key, runtime.renamings, converters, runtime.model.base_model_prefix, runtime.state
        )
        assert pattern is not None
        inputs.setdefault(pattern, []).append(numbered[key])
    converter = next(c for c in converters if set(inputs) <= set(c.source_patterns))
    return dict(_run(runtime, converter, entry, inputs))


def _run(
    runtime: RuntimeModel, converter: Any, entry: str, inputs: Mapping[str, Iterable[Any]]
) -> Iterator[tuple[str, Any]]:
    fresh = copy.deepcopy(converter)
    for pattern, values in inputs.items():
        for position, value in enumerate(values):
            fresh.add_tensor(entry, f"{entry}.{position}", pattern, value)
    for name, value in fresh.convert(entry, model=runtime.model, config=runtime.model.config).items():
        yield name, value[0] if isinstance(value, list) else value


def _convert(runtime: RuntimeModel, converter: Any, entry: str, inputs: Mapping[str, Iterable[Any]]) -> Array:
    results = dict(_run(runtime, converter, entry, inputs))
    return np.asarray(results[entry].contiguous().numpy()) if entry in results else np.empty(0)


def _trace_conversion(runtime: RuntimeModel, name: str, tensors: Mapping[str, StoredTensor]) -> Array:
    keys = runtime.converted[name]
    for entry in dict.fromkeys([name, *(e for e, k in runtime.converted.items() if k == keys)]):
        results = _convert_stored(runtime, entry, keys, tensors, meta=False)
        if name in results:
            return np.asarray(results[name].contiguous().numpy())
    raise Refused(f"transformers does not load {name} from {', '.join(keys)}")
