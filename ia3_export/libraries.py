"""What we use of other libraries beyond their documented interface.

All of it here, each with what is lost when it is gone.

Everything public is imported where it is used. What is listed in `PRIVATE` may be renamed in any release, so
it is looked up by name; a test (``tests/test_libraries.py``) looks for every entry, and CI runs it with the
newest and the oldest releases that ``pyproject.toml`` admits. The names of forward arguments that
transformers has changed are looked up here as well.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from importlib import import_module, metadata
from typing import Any

from ia3_export.errors import Unsupported

#: ``module:attribute`` → what cannot be done when a release no longer has it.
PRIVATE: Mapping[str, str] = {
    "transformers.conversion_mapping:get_model_conversion_mapping": (
        "names that transformers changes while loading"
    ),
    "transformers.core_model_loading:WeightRenaming": "names that transformers changes while loading",
    "transformers.core_model_loading:WeightConverter": (
        "weights that transformers fuses or splits while loading"
    ),
    "transformers.core_model_loading:rename_source_key": "names that transformers changes while loading",
    "transformers.core_model_loading:dot_natural_key": "the order in which transformers fuses weights",
    "transformers.models.auto.modeling_auto:MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": (
        "the class for a task"
    ),
    "transformers.models.auto.modeling_auto:MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": (
        "the class for a task"
    ),
    "transformers.models.auto.modeling_auto:MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": (
        "the class for a task"
    ),
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "the class for a task",
    "transformers.models.auto.modeling_auto:MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": (
        "the class for a task"
    ),
    "transformers.models.auto.modeling_auto:MODEL_MAPPING_NAMES": "the class for a task",
    "transformers:PreTrainedModel.get_expanded_tied_weights_keys": "tied weights",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_missing": "what a checkpoint must hold",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected": "what a checkpoint may hold",
    "transformers.exporters.exporter_dynamo:reset_model_state": "the export to ONNX",
    "transformers.exporters.exporter_onnx:_ONNX_TRANSLATION_TABLE": "the export to ONNX",
    "transformers.exporters.exporter_onnx:apply_onnx_ir_fixes": "the export to ONNX",
    "transformers.exporters.utils:apply_fx_node_fixes": "the export to ONNX",
    "transformers.exporters.utils:apply_patches": "the export to ONNX",
    "onnxscript.rewriter._matcher:SimplePatternMatcher": "giving an exported model's memory back",
    "torch:_disable_dynamo": "importing bitsandbytes without torch's compiler",
    "torch._ops:OpOverload": "the export to ONNX",
    "torch.fx.experimental.symbolic_shapes:statically_known_true": "the export to ONNX with a table of tasks",
    "torch.utils._python_dispatch:TorchDispatchMode": "the export to ONNX",
    "torch.utils._pytree:tree_flatten": "the export to ONNX",
    "torch.utils._pytree:tree_unflatten": "the export to ONNX",
    "torch._subclasses.fake_tensor:FakeTensorMode": "the shapes in .bin and .pt files without their values",
}

#: What a forward calls its cache of keys and values, newest first: ``cache`` since transformers 5.24.
_CACHE = ("cache", "past_key_values")


def private(name: str) -> Any:
    """The entry `name` of `PRIVATE`. Raises `Unsupported` when the installed release has it no longer."""
    lost = PRIVATE[name]
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        library = module.partition(".")[0]
        raise Unsupported(
            f"{library} {metadata.version(library)} has no {module}.{path}, which {lost} needs",
            hint=f"this version of ia3-export does not know that release; install an older {library}",
        ) from error
    return found


def cache_argument(model: Any) -> str | None:
    """The argument of the forward of `model` for keys and values of past tokens, None where it has none.

    transformers gives the states of Mamba and its like the same name, so a model without
    attention heads has none.
    """
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        return None
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE if name in accepted), None)


def returned_cache(output: Any) -> Any:
    """The cache in what a forward with ``use_cache=True`` returned."""
    return next((output[name] for name in _CACHE if name in output), None)


def filled_cache(past: Sequence[Sequence[Any]]) -> Any:
    """A ``DynamicCache`` whose layers hold these keys and values themselves; ``update`` would concatenate
    each with nothing, which a trace keeps.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values = keys, values
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def tied_weights(model: Any) -> dict[str, str]:
    """Tied entries of the state dict of `model`, each with the entry whose tensor it has."""
    return dict(
        private("transformers:PreTrainedModel.get_expanded_tied_weights_keys")(model, all_submodels=True)
    )


def never_missed(model: Any) -> Sequence[str]:
    """Expressions for the entries that a checkpoint of `model` need not hold."""
    private("transformers:PreTrainedModel._keys_to_ignore_on_load_missing")
    return tuple(model._keys_to_ignore_on_load_missing or ())


def never_expected(model: Any) -> Sequence[str]:
    """Expressions for the tensors that a checkpoint of `model` may hold for nothing."""
    private("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected")
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def auto_classes(table: str) -> Mapping[str, Any]:
    """transformers' table `table` of class names by model type."""
    found: Mapping[str, Any] = private(f"transformers.models.auto.modeling_auto:{table}")
    return found


def forget_graphs() -> None:
    """Make the rules of onnxscript's rewriter, which live as long as the process, let go of the graph that
    they looked at last, and of its weights."""
    with suppress(Unsupported):
        matcher = private("onnxscript.rewriter._matcher:SimplePatternMatcher")
        for found in gc.get_objects():
            if issubclass(type(found), matcher):  # isinstance asks what a dead reference points at
                found._current_node = found._graph = found._match = None
    give_back()


def give_back() -> None:
    """Give memory that is no longer used back to the system: glibc keeps what large tensors left between
    small ones."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def compiling_later() -> Iterator[None]:
    """What is imported in this context asks for torch's compiler when it needs it, not before: bitsandbytes
    decorates four functions with ``torch.compile`` and registers kernels that the compiler shall leave alone,
    two seconds and 70 MB of imports in a process that compiles nothing."""
    import torch

    compile_now, disable_now = torch.compile, None
    with suppress(Unsupported):
        disable_now = private("torch:_disable_dynamo")

    @wraps(compile_now)
    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return partial(compile_later, **options)
        compiled = cache(lambda: compile_now(model, **options))
        return wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    def disable_later(function: Any = None, recursive: bool = True) -> Any:
        if function is None or disable_now is None:
            return partial(disable_later, recursive=recursive)
        left_alone = disable_now(function, recursive)

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            # a compiler that nobody has imported is not at work
            chosen = left_alone if "torch._dynamo" in sys.modules else function
            return chosen(*args, **kwargs)

        return called

    torch.compile = compile_later
    if disable_now is not None:
        torch._disable_dynamo = disable_later
    try:
        yield
    finally:
        torch.compile = compile_now
        if disable_now is not None:
            torch._disable_dynamo = disable_now
