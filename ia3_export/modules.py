"""From a module path to stored tensors, by names and shapes alone (no model is built, no torch).

What a file cannot tell (renamed or fused tensors, ties, base-model prefixes, heads) is left to
:mod:`ia3_export.model_class`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import Refused, ShapeMismatch
from ia3_export.fold import Layout

#: Model types whose code uses transformers' Conv1D, which stores its weight as (in, out). A test compares this
#: with the installed transformers.
CONV1D_MODEL_TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "clvp_encoder"}
)

_REPARAMETRIZED = (
    "parametrizations.weight.original0", "parametrizations.weight.original1", "parametrizations.weight.original",
    "weight_g", "weight_v", "weight_orig",
)  # fmt: skip


def model_types(config: Mapping[str, Any] | None) -> set[str]:
    """The ``model_type`` of a configuration and of the sub-configurations in it."""
    if config is None:
        return set()
    found = {config["model_type"]} if isinstance(config.get("model_type"), str) else set()
    for value in config.values():
        if isinstance(value, dict):
            found |= model_types(value)
    return found


def stored_modules(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Paths of the stored modules that IA3 can wrap: those whose ``weight`` has 2, 4 or 5 dimensions."""
    return {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) in (2, 4, 5)
    }


def refuse_untraceable(module: str, present: Collection[str]) -> None:
    """Refuse modules whose stored weight is not what their forward multiplies with; `present` are all tensor names.

    Raises `Refused` for parametrized weights (PEFT's merge of them is lost) and for the output projection of
    ``nn.MultiheadAttention`` (its forward never runs, so PEFT trains a vector that has no effect).
    """
    reparametrized = [f"{module}.{part}" for part in _REPARAMETRIZED if f"{module}.{part}" in present]
    if reparametrized:
        raise Refused(
            f"module {module} is parametrized (weight or spectral norm): its weight is computed from "
            f"{', '.join(reparametrized)}",
            hint="remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations) and save the base again",
        )
    parent, _, leaf = module.rpartition(".")
    if leaf == "out_proj" and f"{parent}.in_proj_weight" in present:
        raise Refused(
            f"module {module} belongs to torch.nn.MultiheadAttention, which reads its weight without calling it: "
            "the vector had no effect in training",
            hint="leave this module out of target_modules",
        )


def weight_layout(site: Site, shape: tuple[int, ...], *, square_is_conv1d: bool) -> Layout:
    """How the weight of `shape` under `site` is stored; checks that the vector fits it.

    A Linear stores (out, in), a Conv1D (in, out); only a square weight leaves that open, and the caller says.
    Raises `ShapeMismatch`.
    """
    length = len(site.vector)
    if site.is_conv or len(shape) > 2:
        fits = len(site.shape) in (1, len(shape)) and (
            shape[0] == length if site.direction == "out" else _fits_groups(length, shape)
        )
        if not fits:
            raise _mismatch(site, shape)
        return "conv"
    if len(shape) != 2:
        raise _mismatch(site, shape)
    axis = 0 if site.direction == "out" else 1
    if shape[0] == shape[1] == length:
        return "conv1d" if square_is_conv1d else "linear"
    if shape[axis] == length:
        return "linear"
    if shape[1 - axis] == length:
        return "conv1d"
    raise _mismatch(site, shape)


def square_is_conv1d(adapter: Adapter, tensors: Mapping[str, StoredTensor], types: set[str]) -> bool:
    """Whether square two-dimensional weights of this model are stored (in, out).

    The model types decide; for a model unknown to transformers, or without a configuration, the adapter's
    other vectors do: where they lie on rectangular weights they show the orientation.
    """
    if types & CONV1D_MODEL_TYPES:
        return True
    if (
        types and adapter.format != "peft"
    ):  # the orientation of their vectors is a reader's word, not the module's
        return False
    layouts = set()
    for site in adapter.sites.values():
        weight = tensors.get(f"{site.module}.weight")
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1]:
            axis = 0 if site.direction == "out" else 1
            layouts.add("linear" if weight.shape[axis] == len(site.vector) else "conv1d")
    return layouts == {"conv1d"}


def in_layer_stack(module: str) -> bool:
    """Whether a path runs through a numbered layer; outside of them weights may be tied (heads)."""
    return any(part.isdigit() for part in module.split("."))


def _fits_groups(length: int, shape: tuple[int, ...]) -> bool:
    groups, rest = divmod(length, shape[1]) if shape[1] else (0, 1)
    return rest == 0 and groups > 0 and shape[0] % groups == 0


def _mismatch(site: Site, shape: tuple[int, ...]) -> ShapeMismatch:
    return ShapeMismatch(
        f"the vector of {site.module} has {len(site.vector):,} elements (shape {list(site.shape)}), but the "
        f"weight in the base is {list(shape)}",
        hint="the adapter was trained on another base model, or on another size of it",
    )
