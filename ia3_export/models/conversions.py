"""How transformers turns stored tensors into a model's parameters, and the way back for vectors.

transformers 5 renames, fuses, splits and transposes tensors while loading
(``transformers.core_model_loading``). Instead of knowing any of these operations, we run them on element
numbers: where the numbers end up says which stored element each element of a parameter comes from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import MissingVector, Refused, kind_and_line
from ia3_export.fold import Array
from ia3_export.libraries import private


@dataclass(frozen=True, slots=True, eq=False)
class Loading:
    """transformers' loading rules for one `model` (on the meta device): its state dict, renamings and
    converters."""

    model: Any
    state: Mapping[str, Any]
    renamings: Sequence[Any]
    converters: Sequence[Any]


def loading_rules(model: Any) -> Loading:
    """The rules by which ``from_pretrained`` would fill `model`."""
    mapping = private("transformers.conversion_mapping:get_model_conversion_mapping")(model)
    renaming = private("transformers.core_model_loading:WeightRenaming")
    converter = private("transformers.core_model_loading:WeightConverter")
    return Loading(
        model,
        model.state_dict(),
        [entry for entry in mapping if isinstance(entry, renaming)],
        [entry for entry in mapping if isinstance(entry, converter)],
    )


def state_entry(loading: Loading, stored_name: str) -> tuple[str, str | None]:
    """The state-dict entry into which a tensor of this stored name is loaded, and the pattern of the
    conversion (fusion, split, transposition) that it goes through on the way, if any."""
    rename_source_key = private("transformers.core_model_loading:rename_source_key")
    prefix = loading.model.base_model_prefix
    entry, pattern = rename_source_key(
        stored_name, loading.renamings, loading.converters, prefix, loading.state
    )
    if entry not in loading.state and stored_name in loading.state:
        return stored_name, None
    return entry, pattern


@dataclass(frozen=True, slots=True)
class Renaming:
    """Names of an adapter that the class has otherwise: module paths, names of tensors, and what all modules
    were called when the adapter's rules were written."""

    modules: Mapping[str, str]
    extras: Mapping[str, str]
    earlier: Mapping[str, str]


def class_names(adapter: Adapter, loading: Loading) -> Renaming:
    """The names that the class has today, where `adapter` states those of an earlier transformers.

    Stored names are earlier module paths, so what loading makes of them, it makes of an adapter's. Names that
    the class has, and names that loading makes nothing of, stay.
    """
    modules = {path for path, _ in loading.model.named_modules()}
    moved: dict[str, str] = {}
    for module in adapter.modules - modules:
        entry, pattern = state_entry(loading, f"{module}.weight")
        if pattern is None and entry in loading.state:
            moved[module] = entry.removesuffix(".weight")
    extras: dict[str, str] = {}
    for name in adapter.extras.keys() - loading.state.keys():
        entry, pattern = state_entry(loading, name)
        if pattern is None and entry in loading.state:
            extras[name] = entry
    return Renaming(moved, extras, _earlier_paths(moved, modules))


def renamed(adapter: Adapter, names: Renaming) -> Adapter:
    """`adapter` with the names that the class has; unchanged where two would become one."""
    moved = names.modules
    extras = {names.extras.get(name, name): tensor for name, tensor in adapter.extras.items()}
    sites = {
        moved.get(key, key): replace(site, module=moved.get(site.module, site.module))
        for key, site in adapter.sites.items()
    }
    if len(sites) < len(adapter.sites) or len(extras) < len(adapter.extras):
        return adapter  # two names of one tensor
    before = {**adapter.rules.earlier, **names.earlier}
    return replace(adapter, sites=sites, extras=extras, rules=replace(adapter.rules, earlier=before))


def in_class_names(adapter: Adapter, loading: Loading) -> Adapter:
    """`adapter` with the names that the class has today (`class_names`)."""
    return renamed(adapter, class_names(adapter, loading))


def _earlier_paths(moved: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """What all `modules` were called, by the beginnings of the paths that `moved` and their like have in
    common."""
    beginnings: dict[str, str] = {}
    for old, new in moved.items():
        one, other = old.split("."), new.split(".")
        while one and other and one[-1] == other[-1]:
            one.pop()
            other.pop()
        if other:
            beginnings[".".join(other)] = ".".join(one)
    before = {new: old for old, new in moved.items()}
    for module in modules:
        found = max((b for b in beginnings if module.startswith(f"{b}.")), key=len, default=None)
        if found is not None:
            before.setdefault(module, (beginnings[found] + module[len(found) :]).removeprefix("."))
    return before


def converted_names(
    loading: Loading, entry: str, keys: Sequence[str], tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """The parameters that the conversion at `entry` makes of the stored tensors `keys`, or would make of the
    right ones: that it fails on these is refused where a vector needs them."""
    try:
        return list(_convert_stored(loading, keys, tensors, meta=True))
    except Refused:
        first, *others = _converter(loading, keys[0]).target_patterns
        return [entry, *(entry.replace(first, other) for other in others)]


def spread(
    loading: Loading,
    name: str,
    sources: Sequence[str],
    multiplier: Array,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, Array]:
    """Carry an elementwise `multiplier` of the parameter `name` over to the stored tensors `sources`.

    Returns a flat multiplier per stored tensor. Raises `Refused` when the loading computes with the weights
    instead of moving them.
    """
    numbers = _convert_stored(loading, sources, tensors, meta=False).get(name)
    traced = np.empty(0) if numbers is None else np.asarray(numbers.contiguous().numpy())
    if traced.shape != multiplier.shape or not np.array_equal(traced, np.floor(traced)):
        raise Refused(
            f"transformers computes {name} from {', '.join(sources)} while loading, instead of "
            "moving elements",
            hint="load the base with transformers, save it again, and merge into that copy",
        )
    sizes = [tensors[stored].size for stored in sources]
    flat = np.ones(sum(sizes), multiplier.dtype)
    flat[traced.reshape(-1).astype("<i8")] = multiplier.reshape(-1)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return dict(zip(sources, parts, strict=True))


def fused_multipliers(
    loading: Loading, vectors: Mapping[str, tuple[Array, str]]
) -> Iterator[tuple[str, Array, list[str]]]:
    """Multipliers of fused parameters for vectors under per-expert (transformers 4) module paths.

    `vectors` maps module path to (vector, direction). Yields a state-dict entry, its multiplier and the
    module paths that went into it, one after the other, since a multiplier is as large as its parameter.
    Raises `MissingVector` when some experts of a fused parameter have vectors and others not.
    """
    import torch

    dot_natural_key = private("transformers.core_model_loading:dot_natural_key")
    groups: dict[str, dict[str, list[str]]] = {}
    for module in sorted(vectors, key=dot_natural_key):
        entry, pattern = state_entry(loading, f"{module}.weight")
        if pattern is not None and entry in loading.state:
            groups.setdefault(entry, {}).setdefault(pattern, []).append(module)
    for entry, by_pattern in groups.items():
        shape = tuple(loading.state[entry].shape)
        converter = _converter(loading, f"{next(iter(by_pattern.values()))[0]}.weight")
        for modules in by_pattern.values():
            if len(modules) != shape[0]:
                raise MissingVector(
                    f"{entry} holds {shape[0]} experts, but the adapter has vectors for {len(modules)} of "
                    f"them ({modules[0]}, ...)",
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
                result = _convert(loading, converter, entry, inputs)
                if tuple(result.shape) == shape:
                    multiplier = result
                    break
        if multiplier is not None:
            yield entry, multiplier, [module for modules in by_pattern.values() for module in modules]


def _convert_stored(
    loading: Loading, keys: Sequence[str], tensors: Mapping[str, StoredTensor], *, meta: bool
) -> dict[str, Any]:
    """Run the loading operations of the stored tensors `keys` on element numbers (or, `meta`, on shapes
    alone)."""
    import torch

    dot_natural_key = private("transformers.core_model_loading:dot_natural_key")
    numbered = {}
    first = 0
    for key in keys:
        count, shape = tensors[key].size, tensors[key].shape
        if meta:
            numbered[key] = torch.empty(shape, dtype=torch.float64, device="meta")
        else:
            numbered[key] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    inputs: dict[str, list[Any]] = {}
    for key in sorted(keys, key=dot_natural_key):
        _, pattern = state_entry(loading, key)
        assert pattern is not None
        inputs.setdefault(pattern, []).append(numbered[key])
    entry, _ = state_entry(loading, keys[0])
    return dict(_run(loading, _converter(loading, keys[0]), entry, inputs))


def _converter(loading: Loading, key: str) -> Any:
    """The converter that the stored tensor `key` goes through; another may have the same patterns for another
    part of the model."""
    rename_source_key = private("transformers.core_model_loading:rename_source_key")
    return next(
        c for c in loading.converters if rename_source_key(key, loading.renamings, [c])[1] is not None
    )


def _run(
    loading: Loading, converter: Any, entry: str, inputs: Mapping[str, Iterable[Any]]
) -> Iterator[tuple[str, Any]]:
    fresh = copy.deepcopy(converter)
    for pattern, values in inputs.items():
        for position, value in enumerate(values):
            fresh.add_tensor(entry, f"{entry}.{position}", pattern, value)
    try:
        made = fresh.convert(entry, model=loading.model, config=loading.model.config)
    # whatever transformers' operations and torch raise for tensors of another model
    except Exception as error:
        raise Refused(
            f"transformers cannot make {entry} of the tensors stored for it: {kind_and_line(error)}",
            hint="config.json does not belong to these weights, or load the base with transformers, save "
            "it again, and merge into that copy",
        ) from error
    for name, value in made.items():
        yield name, value[0] if isinstance(value, list) else value


def _convert(loading: Loading, converter: Any, entry: str, inputs: Mapping[str, Iterable[Any]]) -> Array:
    results = dict(_run(loading, converter, entry, inputs))
    return np.asarray(results[entry].contiguous().numpy()) if entry in results else np.empty(0)
