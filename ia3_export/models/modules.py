"""From a module path to stored tensors, by names and shapes alone (no model is built, no torch).

What a file cannot tell (renamed or fused tensors, ties, base-model prefixes, heads) is left to
:mod:`ia3_export.models.model_class`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ia3_export.adapters.model import Adapter, Site
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.errors import Refused, ShapeMismatch
from ia3_export.fold import Layout

#: Model types whose code uses transformers' Conv1D, which stores its weight as (in, out). A test compares
#: this with the installed transformers.
CONV1D_MODEL_TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "clvp_encoder"}
)
#: Of them, those in which every two-dimensional weight of a numbered layer is a Conv1D's.
_CONV1D_THROUGHOUT = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_STORED: Mapping[Layout, str] = {
    "linear": "(out, in)",
    "conv1d": "(in, out), as Conv1D does",
    "conv": "as a convolution",
}

#: What PEFT writes of its other methods.
_WRAPPERS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save"})
_REPARAMETRIZED = (
    "parametrizations.weight.original0", "parametrizations.weight.original1",
    "parametrizations.weight.original", "weight_g", "weight_v", "weight_orig",
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


def refuse_wrapped(names: Iterable[str]) -> None:
    """Raise `Refused` for a base in which PEFT's other methods lie beside the weights: which of them counts
    is not known."""
    for name in names:
        if not _WRAPPERS.isdisjoint(name.split(".")):
            raise Refused(
                f"the base was saved while PEFT wrapped it: it holds {name}, which no model of "
                "transformers loads",
                hint="save the plain model (model.merge_and_unload() or model.unload(), then "
                "save_pretrained), or give the base it was loaded from",
            )


def refuse_untraceable(module: str, present: Collection[str]) -> None:
    """Refuse modules whose stored weight is not what their forward multiplies with; `present` are all tensor
    names.

    Raises `Refused` for parametrized weights (PEFT's merge of them is lost) and for the output projection of
    ``nn.MultiheadAttention`` (its forward never runs, so PEFT trains a vector that has no effect).
    """
    reparametrized = [f"{module}.{part}" for part in _REPARAMETRIZED if f"{module}.{part}" in present]
    if reparametrized:
        raise Refused(
            f"module {module} is parametrized (weight or spectral norm): its weight is computed from "
            f"{', '.join(reparametrized)}",
            hint="remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations) and save "
            "the base again",
        )
    parent, _, leaf = module.rpartition(".")
    if leaf == "out_proj" and f"{parent}.in_proj_weight" in present:
        raise Refused(
            f"module {module} belongs to torch.nn.MultiheadAttention, which reads its weight without "
            "calling it: the vector had no effect in training",
            hint="leave this module out of target_modules",
        )


def fitting_layouts(site: Site, shape: tuple[int, ...]) -> tuple[Layout, ...]:
    """The ways of storing a weight of `shape` in which the vector of `site` fits it.

    A Linear stores (out, in), a Conv1D (in, out): a square weight leaves that open.
    """
    length = len(site.vector)
    if site.is_conv or len(shape) > 2:
        fits = len(site.shape) in (1, len(shape)) and (
            shape[0] == length if site.direction == "out" else _fits_groups(length, shape)
        )
        return ("conv",) if fits else ()
    if len(shape) != 2:
        return ()
    axis = 0 if site.direction == "out" else 1
    stored: tuple[tuple[Layout, int], ...] = (("linear", axis), ("conv1d", 1 - axis))
    return tuple(layout for layout, side in stored if shape[side] == length)


def weight_layout(site: Site, shape: tuple[int, ...], possible: Sequence[Layout]) -> Layout:
    """How the weight of `shape` under `site` is stored: the first of the `possible` layouts in which the
    vector fits.

    Raises `ShapeMismatch` when it fits in none.
    """
    fits = fitting_layouts(site, shape)
    if fits == ("conv",):
        return "conv"
    found = next((layout for layout in possible if layout in fits), None)
    if found is None:
        raise mismatch(site, shape, fits)
    return found


def mismatch(site: Site, shape: tuple[int, ...], fits: Sequence[Layout] = ()) -> ShapeMismatch:
    """A vector of the wrong length; `fits` are the layouts, not this weight's, in which it would be right."""
    otherwise = (
        f"; on its {site.direction}put it would fit only one stored {_STORED[fits[0]]}" if fits else ""
    )
    return ShapeMismatch(
        f"the vector of {site.module} has {len(site.vector):,} elements (shape {list(site.shape)}), but "
        f"the weight in the base is {list(shape)}{otherwise}",
        hint="the vector was cut (a sharded save?), or trained on another model or another size of it"
        + ("" if len(site.shape) == 2 else "; or (--map) it scales the other side"),
    )


def is_settled(site: Site, shape: tuple[int, ...], types: set[str]) -> bool:
    """Whether names and shapes alone say how the weight under `site` is stored, given the `types` of the
    model.

    They do not where a vector fits the weight of a Linear only if that is stored the other way, where a model
    has both Linear and Conv1D, and where the groups of a convolution follow from the length of its vector.
    """
    fits = fitting_layouts(site, shape)
    if fits == ("conv",):
        return site.direction == "out" or len(site.vector) == shape[1]
    if types & CONV1D_MODEL_TYPES:
        return types <= _CONV1D_THROUGHOUT and in_layer_stack(site.module) and "conv1d" in fits
    return fits != ("conv1d",)


def possible_layouts(types: set[str], shown: Collection[Layout], *, known: bool) -> tuple[Layout, ...]:
    """How two-dimensional weights may be stored in a model without a class, likeliest first.

    A model of `types` that are `known` to transformers and have no Conv1D has none. Of an unknown one, or
    without a configuration, the vectors decide by what `shown_layouts` finds, if they all agree.
    """
    if types & CONV1D_MODEL_TYPES:
        return ("conv1d", "linear")
    return ("conv1d",) if set(shown) == {"conv1d"} and not known else ("linear",)


def shown_layouts(adapter: Adapter, tensors: Mapping[str, StoredTensor]) -> set[Layout]:
    """The layouts that an adapter's own vectors, the biases beside them and its configuration speak for."""
    shown: set[Layout] = set()
    for site in adapter.sites.values():
        weight, bias = tensors.get(f"{site.module}.weight"), tensors.get(f"{site.module}.bias")
        if weight is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
            continue
        shown.update(fitting_layouts(site, weight.shape))
        if weight.computed is not None:  # its quantizer stored (out, in)
            shown.add("linear")
        if bias is not None:
            shown.add("linear" if bias.shape == weight.shape[:1] else "conv1d")
    if adapter.config.get("fan_in_fan_out") is False:  # which PEFT sets for every Conv1D that it wraps
        shown.add("linear")
    return shown


def in_layer_stack(module: str) -> bool:
    """Whether a path runs through a numbered layer; outside of them weights may be tied (heads)."""
    return any(part.isdigit() for part in module.split("."))


def _fits_groups(length: int, shape: tuple[int, ...]) -> bool:
    groups, rest = divmod(length, shape[1]) if shape[1] else (0, 1)
    return rest == 0 and groups > 0 and shape[0] % groups == 0
