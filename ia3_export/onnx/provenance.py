"""Where the initializers of a graph come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ia3_export.checkpoint.header import StoredTensor


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored tensor that an initializer holds, `transposed` or as it is. `tensor` is None where several stored tensors were put
    together while loading (fused experts), or where torch computed the values (folded constants)."""

    tensor: str | None
    transposed: bool


def trace_origins(graph: Any, model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Origin]:
    """The origin of every initializer of the ``onnx_ir.Model`` `graph`, traced from `model`, that is a parameter or buffer of it, by name.

    A parameter is stored under its own path, or with the base-model prefix more or less; one that was loaded from another
    (tied) tensor is listed under that tensor.
    """
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    by_storage: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in state.items():
        key = _stored_name(name, prefix, stored)
        if key is not None:
            by_storage.setdefault((value.data_ptr(), tuple(value.shape)), key)
    origins = {}
    for name, value in graph.graph.initializers.items():
        parameter = state.get(name)
        if parameter is None or value.const_value is None:
            continue
        key = _stored_name(name, prefix, stored)
        key = key or by_storage.get((parameter.data_ptr(), tuple(parameter.shape)))
        shape = tuple(int(size) for size in value.const_value.shape)
        turned = shape != tuple(parameter.shape) or _is_turned(value.const_value, parameter)
        origins[name] = Origin(key, turned)
    return origins


def _is_turned(tensor: Any, parameter: Any) -> bool:
    """Whether a square weight is held as its transpose: then it is a view with other strides."""
    raw: Any = getattr(tensor, "raw", None)
    return parameter.ndim == 2 and hasattr(raw, "stride") and raw.stride() != parameter.stride()


def _stored_name(name: str, prefix: str, stored: Mapping[str, StoredTensor]) -> str | None:
    candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((candidate for candidate in candidates if candidate in stored), None)
