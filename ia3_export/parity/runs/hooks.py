"""Vectors applied by hooks that multiply activations, where PEFT does not apply them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia3_export.adapters.combine import combine_vectors
from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import StoredTensor, read_values
from ia3_export.errors import Unsupported
from ia3_export.models.conversions import in_class_names, loading_rules
from ia3_export.planning.recipe import Recipe


def named_as_in(model: Any, adapters: Sequence[Adapter]) -> list[Adapter]:
    """`adapters` with the names that tensors have in the loaded `model`."""
    rules = loading_rules(model)
    return [in_class_names(adapter, rules) for adapter in adapters]


def fill_entry(state: Mapping[str, Any], name: str, tensor: StoredTensor) -> None:
    """Copy `tensor`, which an adapter brings, into the entry `name` of a model's `state`.

    Raises `Unsupported` where that is not in memory.
    """
    import torch

    if state[name].device.type == "meta":
        raise Unsupported(
            f"{name} comes from the adapter, and the model is too large for memory",
            hint="use --weights-only, a larger --max-memory, or a machine with more memory",
        )
    with torch.no_grad():
        state[name].copy_(torch.from_numpy(read_values(tensor)))


def multiply_live(model: Any, adapters: Sequence[Adapter], recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """Multiply the activations of `model` with the vectors of `adapters`, combined by `recipe`, and give it
    the tensors that they bring.

    The vectors by module path, which the hooks multiply with. Raises `Unsupported` for a module or tensor
    that the model has not.
    """
    adapters = named_as_in(model, adapters)
    for adapter in adapters:
        _copy_modules(model, adapter)
        state = model.state_dict()
        for name, tensor in adapter.extras.items():
            if name not in state:
                raise Unsupported(
                    f"{adapter.name} brings {name}, which does not exist in {type(model).__name__}",
                    hint="its weight is fused at run time (experts of a mixture); --weights-only proves "
                    "such a merge",
                )
            fill_entry(state, name, tensor)
    modules = dict(model.named_modules())
    vectors = []
    for module, site, vector in _combined(adapters, recipe):
        target = modules.get(module)
        if target is None:
            raise Unsupported(
                f"module {module} does not exist in {type(model).__name__}, so its vector cannot be "
                "applied live",
                hint="its weight is fused at run time (experts of a mixture); --weights-only "
                "proves such a merge",
            )
        factors = _factors(target, vector)
        _hook(target, site, factors)
        vectors.append((module, factors))
    return tuple(vectors)


def _copy_modules(model: Any, adapter: Adapter) -> None:
    """Give the modules that PEFT trains a copy of tensors of their own.

    They leave the ties to the rest of the model.
    """
    copies = {adapter.copy_of(name.rpartition(".")[0]) or "" for name in adapter.extras}
    for path in sorted(copies - {""}):
        parent, _, leaf = path.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, leaf, copy.deepcopy(getattr(holder, leaf)))


def _combined(adapters: Sequence[Adapter], recipe: Recipe) -> list[tuple[str, Site, Any]]:
    if recipe.combine == "product":
        return [(site.module, site, site.vector) for a in adapters for site in a.sites.values()]
    union: Mapping[str, Site] = {key: s for a in reversed(adapters) for key, s in a.sites.items()}
    rows = []
    for key, site in union.items():
        vectors = [a.sites[key].vector if key in a.sites else None for a in adapters]
        rows.append((site.module, site, combine_vectors(vectors, recipe.weights, recipe.combine, "F64")))
    return rows


def _factors(target: Any, vector: Any) -> Any:
    """`vector` as a tensor that multiplies the inputs or outputs of the module `target`."""
    import torch

    dimensions = target.weight.dim()  # a bare vector does not say that it is a convolution's
    shape = (1, -1, *(1,) * (dimensions - 2)) if dimensions > 2 else (-1,)
    return torch.from_numpy(np.array(vector)).reshape(shape)


def _hook(target: Any, site: Site, factors: Any) -> None:
    def scaled(values: Any) -> Any:
        return values * factors.to(device=values.device, dtype=values.dtype)

    if site.direction == "out":
        target.register_forward_hook(lambda _m, _i, output: scaled(output))
    else:
        target.register_forward_pre_hook(lambda _m, inputs: (scaled(inputs[0]), *inputs[1:]))
