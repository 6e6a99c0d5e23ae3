"""What only the model class knows: built on the meta device from ``config.json``, without weights.

Stored names differ from module paths where transformers renames, fuses or splits tensors while loading
(``transformers.core_model_loading``), where a base checkpoint lacks or carries the base-model prefix, and
where tensors are tied. Everything is asked of transformers itself; no remote code runs.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from logging import ERROR, getLogger
from typing import Any

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import architectures
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import IA3ExportError, Unsupported, kind_and_line
from ia3_export.fold import Layout
from ia3_export.libraries import auto_classes, never_missed, tied_weights
from ia3_export.models.conversions import (
    Loading,
    Renaming,
    class_names,
    converted_names,
    in_class_names,
    loading_rules,
    state_entry,
)

_TASK_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class RuntimeModel:
    """A transformers model as the adapter saw it, and how the checkpoint's names lead to it.

    `layouts` gives the kind of every module that IA3 can wrap, `groups` those of convolutions, `modules` are
    the paths of all, `shapes` gives every state-dict entry, `parameters` are the trainable ones, `ties` maps
    a tied entry to its source, `needed` are the entries that a checkpoint must hold, `stored` maps an entry
    to the one stored tensor it is loaded from unchanged, `converted` to those that it is made of.
    `embeddings` are the paths of lookup tables. `config` is the configuration that fits the adapter's heads
    and embeddings, `renaming` the adapter's names that the class has otherwise. `built` are the loading rules
    where the class has been built.
    """

    class_name: str
    config: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    groups: Mapping[str, int]
    modules: frozenset[str]
    parameters: frozenset[str]
    needed: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    stored: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    input_embedding: str | None
    output_embedding: str | None
    embeddings: frozenset[str]
    renaming: Renaming
    built: Loading | None = None

    @cached_property
    def loading(self) -> Loading:
        """The loading rules of the class, which is built for them where it has not been."""
        if self.built is not None:
            return self.built
        with quiet():
            return loading_rules(build_on_meta(self.class_name, self.config))


def load_runtime_model(
    config: Mapping[str, Any], adapter: Adapter, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    """The class in which the adapter's module paths exist, tried in this order: the adapter's own record
    (``auto_mapping``), its task type, the base's ``architectures``, the bare model.

    When no class has all of them the one with the most is returned; the caller names what is left over. Among
    classes that have them all, the one with the heads that were trained, then the one that the checkpoint
    fills best. Raises `Unsupported` when transformers has no class for the configuration.
    """
    with quiet():
        try:
            return _best_class(config, adapter, tensors)
        except IA3ExportError:
            raise
        except Exception as error:  # a damaged config.json makes transformers fail in any way there is
            raise Unsupported(
                f"transformers cannot build a model from config.json: {kind_and_line(error)}",
                hint="check config.json; without a model class the adapter's names must be the stored names",
            ) from error


def _best_class(
    config: Mapping[str, Any], adapter: Adapter, tensors: Mapping[str, StoredTensor]
) -> RuntimeModel:
    best: tuple[tuple[int, int, int], RuntimeModel] | None = None
    for name in _candidate_classes(config, adapter):
        model = build_on_meta(name, config)
        named = in_class_names(adapter, loading_rules(model))
        fitted, model = _fit_config(name, config, named, model)
        runtime = _describe(name, fitted, model, adapter, tensors)
        left_over = sum(module not in runtime.layouts for module in named.modules)
        left_over += sum(extra not in runtime.shapes for extra in named.extras)
        # a head that the adapter trained and lost is no sign of the wrong class
        absent = sum(
            entry not in named.extras and named.copy_of(entry.rpartition(".")[0]) is None
            for entry in absent_entries(runtime)
        )
        headless = len(named.without_module(path for path, _ in model.named_modules()))
        if best is None or (left_over, headless, absent) < best[0]:
            best = (left_over, headless, absent), runtime
        if left_over == headless == absent == 0:
            break
    if best is None:
        raise Unsupported(
            f"transformers has no model class for model_type {config.get('model_type')!r}",
            hint="the adapter's module names must be the stored names for such a model; remote "
            "code is not run",
        )
    return best[1]


def absent_entries(runtime: RuntimeModel) -> list[str]:
    """What the model needs and the checkpoint has not, by name."""
    present = runtime.stored.keys() | runtime.converted.keys() | runtime.ties.keys()
    return sorted(runtime.needed - present)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and torch draw progress bars and warn of their own internals; neither belongs into a
    report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = {name: getLogger(name).level for name in ("accelerate", "bitsandbytes")}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in others:
        getLogger(name).setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        for name, before in others.items():
            getLogger(name).setLevel(before)
        if bars:
            logging.enable_progress_bar()


def make_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object for a ``config.json``. Raises `Unsupported` for an unknown model
    type."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise Unsupported(
            f"transformers does not know model_type {model_type!r}",
            hint="the adapter's module names must be the stored names for such a model; remote "
            "code is not run",
        )
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    return CONFIG_MAPPING[model_type].from_dict(_with_numbers(copy.deepcopy(fields)))


def _with_numbers(value: Any) -> Any:
    """A value of ``config.json`` with what JSON has no numbers for, which transformers writes as
    ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_numbers(entry) for key, entry in value.items()}
    return value


def _candidate_classes(config: Mapping[str, Any], adapter: Adapter) -> Iterator[str]:
    import transformers

    names: list[Any] = [adapter.class_name]
    tables = [_TASK_TABLES.get(adapter.task_type or ""), "MODEL_MAPPING_NAMES"]
    model_type = config.get("model_type")
    of_task, bare = (auto_classes(t).get(str(model_type)) if t else None for t in tables)
    names += [of_task, *architectures(config), bare]
    for name in dict.fromkeys(n[0] if isinstance(n, tuple | list) else n for n in names):
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            continue
        if _class_config(name, config) is not None:
            yield name


def _class_config(name: str, config: Mapping[str, Any]) -> Any | None:
    """The configuration object that the class `name` takes: the whole, or its text part; None if neither
    fits."""
    import transformers

    made = make_config(config)
    wanted = getattr(transformers, name).config_class or object
    return next((c for c in (made, getattr(made, "text_config", None)) if isinstance(c, wanted)), None)


def build_on_meta(name: str, config: Mapping[str, Any]) -> Any:
    """The class `name` of transformers for a ``config.json``, without weights. Raises what transformers
    raises."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, name)(_class_config(name, config)).eval()


def _fit_config(
    name: str, config: Mapping[str, Any], adapter: Adapter, model: Any
) -> tuple[dict[str, Any], Any]:
    """The configuration with the number of labels and the vocabulary that the adapter's own tensors have;
    `model` has that of the base."""
    fitted = dict(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    misfits = {
        extra: tensor.shape
        for extra, tensor in adapter.extras.items()
        if extra in shapes and shapes[extra] != tensor.shape
    }
    if not misfits:
        return _with_labels(fitted, adapter), model
    embeddings = {_embedding_name(model, which) for which in ("input", "output")}
    heads = {extra: (shapes[extra], shape) for extra, shape in misfits.items() if extra not in embeddings}
    for extra, shape in misfits.items():
        if extra in embeddings and shape[1:] == shapes[extra][1:]:
            _set_vocabulary(fitted, shapes[extra][0], shape[0])
    model = build_on_meta(name, fitted)
    now = model.state_dict()
    if all(tuple(now[extra].shape) == shape for extra, shape in misfits.items()):
        return _with_labels(fitted, adapter), model  # all of them followed the vocabulary
    for resized in _other_heads(fitted, heads.values(), getattr(model.config, "num_labels", 0), adapter):
        trial = build_on_meta(name, resized)
        now = trial.state_dict()
        if all(tuple(now[head].shape) == shape for head, (_, shape) in heads.items()):
            return _with_labels(resized, adapter), trial
    return fitted, model


def _other_heads(
    config: Mapping[str, Any],
    heads: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    count: int,
    adapter: Adapter,
) -> Iterator[dict[str, Any]]:
    """Configurations in which heads may have their new shapes, with other labels than `count` or another
    vocabulary; `heads` are the shapes before and after."""
    rows = dict.fromkeys((old[0], new[0]) for old, new in heads if old and new)
    # a detector has one row more than labels
    for labels in dict.fromkeys(n for old, new in rows for n in (new, count + new - old) if n > 0):
        own = adapter.labels if len(adapter.labels) == labels else None
        yield _labelled(config, own or [f"LABEL_{i}" for i in range(labels)])
    for old, new in rows:  # the characters of a recogniser of speech, which are no embedding
        if config.get("vocab_size") == old:
            yield {**config, "vocab_size": new}


def _labelled(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The configuration with these names of labels, and as many labels."""
    tables: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return {key: value for key, value in config.items() if key != "num_labels"} | tables


def _with_labels(config: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The configuration with the adapter's own names of its labels, and its kind of problem, if it has
    them."""
    names = adapter.labels
    if names and len(names) == len(config.get("id2label") or range(config.get("num_labels", 2))):
        config = _labelled(config, names)
    if "problem_type" in adapter.config:
        config["problem_type"] = adapter.config["problem_type"]
    return config


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
    name: str,
    config: Mapping[str, Any],
    model: Any,
    adapter: Adapter,
    tensors: Mapping[str, StoredTensor],
) -> RuntimeModel:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type, Layout], ...] = (
        (nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (nn.Conv2d, "conv"),
        (nn.Conv3d, "conv"),
    )
    modules = dict(model.named_modules())
    layouts: dict[str, Layout] = {
        path: layout for path, module in modules.items() for cls, layout in kinds if isinstance(module, cls)
    }
    loading = loading_rules(model)
    stored, converted = sources(loading, tensors)
    return RuntimeModel(
        class_name=name,
        config=config,
        layouts=layouts,
        groups={path: modules[path].groups for path, layout in layouts.items() if layout == "conv"},
        modules=frozenset(modules),
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        needed=needed_entries(model, loading.state),
        shapes={key: tuple(value.shape) for key, value in loading.state.items()},
        ties=tied_weights(model),
        stored=stored,
        converted=converted,
        input_embedding=_embedding_name(model, "input"),
        output_embedding=_embedding_name(model, "output"),
        embeddings=frozenset(path for path, module in modules.items() if isinstance(module, nn.Embedding)),
        renaming=class_names(adapter, loading),
        built=loading,
    )


def sources(
    loading: Loading, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The stored tensor that each state-dict entry is loaded from as it is, and those that the other entries
    are made of."""
    stored: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for key in tensors:
        entry, pattern = state_entry(loading, key)
        if entry in loading.state and pattern is None:
            stored[entry] = key
        elif entry in loading.state:
            parts.setdefault(entry, []).append(key)
    converted = {
        target: tuple(keys)
        for entry, keys in parts.items()
        for target in converted_names(loading, entry, keys, tensors)
    }
    return stored, converted


def needed_entries(model: Any, state: Mapping[str, Any]) -> frozenset[str]:
    """The entries of the state of `model` that a checkpoint must hold."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [re.compile(pattern) for pattern in never_missed(model)]
    return frozenset(
        name for name in state if name in parameters and not any(pattern.search(name) for pattern in ignored)
    )
