"""Where the initializers of a graph come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ia3_export.checkpoint.header import StoredTensor
from ia3_export.models.conversions import loading_rules, state_entry


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored tensor that an initializer holds, `transposed` or as it is.

    `tensor` is None where several stored tensors were put together while loading (fused experts), or where
    torch computed the values (folded constants). `dtype` (safetensors' name) and `shape` are the stored ones;
    of what was quantized, the dtype in which a model has it.
    """

    tensor: str | None
    transposed: bool
    dtype: str | None = None
    shape: tuple[int, ...] = ()


def trace_origins(graph: Any, model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Origin]:
    """The origin, by name, of every initializer of `graph` that is a parameter or buffer of `model`.

    `graph` is an ``onnx_ir.Model`` that was traced from `model`.

    Stored names become paths by transformers' own loading rules (prefixes, renames); one that was loaded from
    another (tied) tensor is listed under that tensor.
    """
    state = model.state_dict(keep_vars=True)
    rules = loading_rules(model)
    keys: dict[str, str] = {}
    for key in stored:
        entry, converted = state_entry(rules, key)
        if converted is None:
            keys[entry] = key
    by_storage: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in state.items():
        if name in keys:
            by_storage.setdefault((value.data_ptr(), tuple(value.shape)), keys[name])
    origins = {}
    for name, value in graph.graph.initializers.items():
        parameter = state.get(name)
        if parameter is None or value.const_value is None:
            continue
        origin = keys.get(name) or by_storage.get((parameter.data_ptr(), tuple(parameter.shape)))
        shape = tuple(int(size) for size in value.const_value.shape)
        turned = shape != tuple(parameter.shape) or _is_turned(value.const_value, parameter)
        if origin is None:
            origins[name] = Origin(None, turned)
        else:
            origins[name] = Origin(origin, turned, stored[origin].compute_dtype, stored[origin].shape)
    return origins


def _is_turned(tensor: Any, parameter: Any) -> bool:
    """Whether a square weight is held as its transpose: then it is a view with other strides."""
    raw: Any = getattr(tensor, "raw", None)
    return parameter.ndim == 2 and hasattr(raw, "stride") and raw.stride() != parameter.stride()
