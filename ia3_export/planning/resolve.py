"""Where every vector and extra tensor of an adapter lands in a checkpoint.

First by names and shapes alone. Only what those leave open (see `_open_questions`) goes to the model class,
which costs an import of transformers, once (``models.answers``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ia3_export.adapters.mangled import restore_names
from ia3_export.adapters.model import Adapter, Site, second_key
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.header import StoredTensor, same_bytes
from ia3_export.errors import Refused, ShapeMismatch, Unsupported, UnusedVector
from ia3_export.fold import FLOAT_DTYPES, Layout
from ia3_export.models.modules import (
    CONV1D_MODEL_TYPES,
    in_layer_stack,
    is_settled,
    mismatch,
    model_types,
    possible_layouts,
    refuse_untraceable,
    refuse_wrapped,
    shown_layouts,
    stored_modules,
    weight_layout,
)
from ia3_export.planning.completeness import (
    check_lost,
    check_missing,
    check_random,
    check_unused,
    heads_in_question,
    is_fused_expert,
    missing_by_name,
)
from ia3_export.planning.placement import Part, Placement, Resolution

if TYPE_CHECKING:
    from ia3_export.models.model_class import RuntimeModel


def resolve(
    adapter: Adapter, checkpoint: Checkpoint, *, allow_missing: bool = False, allow_unused: bool = False
) -> Resolution:
    """Lay `adapter` over `checkpoint`; whatever does not fit is in the result's `problems`.

    Raises `DamagedFile` only, for an expression of the adapter's configuration that takes too long.
    """
    result = Resolution(adapter=adapter)
    try:
        refuse_wrapped(checkpoint.tensors)
    except Refused as error:
        result.problems.append(error)
        return result
    adapter.rules.look_at(
        {*stored_modules(checkpoint.tensors), *(name.rpartition(".")[0] for name in adapter.extras)}
    )
    _ask_class(result, checkpoint)
    adapter = result.adapter
    try:
        modules = result.runtime.layouts if result.runtime else stored_modules(checkpoint.tensors)
        restored = restore_names(adapter, modules)
    except Refused as error:
        result.problems.append(error)
        return result
    if restored is not None:
        result.adapter = restored
        _ask_class(result, checkpoint)
        adapter = result.adapter
    result.warnings.extend(adapter.warnings)
    possible = _possible_layouts(result, checkpoint)
    present = {*checkpoint.tensors, *(result.runtime.shapes if result.runtime is not None else ())}
    unused = []
    for site in adapter.sites.values():
        try:
            refuse_untraceable(site.module, present)
            placement = _place(site, checkpoint, result, possible)
            if placement is None:
                unused.append(site.module)
            else:
                _insert(result, placement)
        except (Refused, Unsupported) as error:
            if isinstance(error, ShapeMismatch) or (site.vector != 1).any():
                result.problems.append(error)
            else:  # never moved in training, mostly because the module's forward never runs
                result.warnings.append(
                    f"the vector of {site.module} is all ones and changes nothing: {error}"
                )
    for name in adapter.extras:
        try:
            _place_extra(name, checkpoint, result, allow_unused=allow_unused)
        except Refused as error:
            result.problems.append(error)
    check_unused(adapter, checkpoint, unused, result, allow_unused=allow_unused)
    if allow_unused:
        result.adapter = replace(
            adapter,
            sites={key: site for key, site in adapter.sites.items() if site.module not in unused},
            extras={name: tensor for name, tensor in adapter.extras.items() if name in result.extras},
        )
    check_missing(adapter, checkpoint, result, allow_missing=allow_missing)
    check_lost(adapter, checkpoint, result, allow_missing=allow_missing)
    check_random(result)
    return result


def _ask_class(result: Resolution, checkpoint: Checkpoint) -> None:
    """Build the model class where names and shapes leave something open."""
    if checkpoint.config is None or not _open_questions(result.adapter, checkpoint):
        return
    from ia3_export.models.answers import runtime_model
    from ia3_export.models.conversions import renamed

    try:
        result.runtime = runtime_model(checkpoint.config, result.adapter, checkpoint.tensors)
    except Unsupported as error:
        result.warnings.append(f"{error}; names are taken as stored")
        return
    result.adapter = renamed(result.adapter, result.runtime.renaming)
    result.adapter.rules.look_at(result.runtime.layouts)


def _open_questions(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    """Whether names and shapes leave something open that the model class can answer."""
    may_be_tied = checkpoint.config is None or checkpoint.config.get("tie_word_embeddings") is not False
    types = model_types(checkpoint.config)
    for site in adapter.sites.values():
        weight = checkpoint.tensors.get(f"{site.module}.weight")
        if weight is not None and not is_settled(site, weight.shape, types):
            return True
    for module in adapter.modules:
        if f"{module}.weight" not in checkpoint.tensors or (may_be_tied and not in_layer_stack(module)):
            return True
    for name, tensor in adapter.extras.items():
        stored = checkpoint.tensors.get(name)
        if stored is None or stored.shape != tensor.shape or (may_be_tied and not in_layer_stack(name)):
            return True
    return bool(missing_by_name(adapter, checkpoint)) or heads_in_question(adapter, checkpoint)


def _possible_layouts(result: Resolution, checkpoint: Checkpoint) -> tuple[Layout, ...]:
    """How weights of modules that no class answers for may be stored, with a warning if that is assumed."""
    adapter, types = result.adapter, model_types(checkpoint.config)
    # the orientation of other formats' vectors is a reader's word, which a model type outweighs
    known = result.runtime is not None or (bool(types) and adapter.format != "peft")
    possible = possible_layouts(types, shown_layouts(adapter, checkpoint.tensors), known=known)
    if known or types & CONV1D_MODEL_TYPES:
        return possible
    weights = [checkpoint.tensors.get(f"{module}.weight") for module in adapter.modules]
    square = any(w is not None and len(w.shape) == 2 and w.shape[0] == w.shape[1] for w in weights)
    if possible == ("conv1d",) or (square and checkpoint.config is None):
        result.warnings.append(
            f"{'the model type is unknown' if types else 'the base has no config.json'}, so "
            + ("by their vectors the weights" if possible == ("conv1d",) else "square weights")
            + f" are taken as {'Conv1D (in, out)' if possible == ('conv1d',) else 'Linear (out, in)'}"
        )
    return possible


def _insert(result: Resolution, placement: Placement) -> None:
    site = placement.site
    key = placement.parts[0].tensor if placement.parts[0].kind != "expert" else site.module
    if key in result.placements and result.placements[key].site.module == site.module:
        key = second_key(key, site.direction)
    if key in result.placements:
        raise Refused(
            f"the vectors of {result.placements[key].site.module} and {site.module} both land on {key}",
            hint="the modules share a weight; a merged checkpoint cannot give them different ones",
        )
    result.placements[key] = placement


def _place(
    site: Site, checkpoint: Checkpoint, result: Resolution, possible: tuple[Layout, ...]
) -> Placement | None:
    """The tensors under `site`, or None when the module has no weight in the base."""
    runtime, module = result.runtime, site.module
    if runtime is not None and module in runtime.layouts:
        return _place_by_class(site, checkpoint, result, runtime)
    if runtime is not None and module in runtime.embeddings:
        raise Refused(
            f"module {module} is an embedding: a lookup, whose weight a vector does not fold into",
            hint="IA3 scales Linear, Conv1D and convolutions",
        )
    weight = checkpoint.tensors.get(f"{module}.weight")
    if weight is not None:
        _check_dtype(module, weight.dtype)
        layout = weight_layout(site, weight.shape, possible)
        parts = [Part("direct", weight.name, weight.name, weight.shape, layout)]
        bias = checkpoint.tensors.get(f"{module}.bias")
        if bias is not None and site.direction == "out":
            parts.append(Part("direct", bias.name, bias.name, bias.shape, layout))
        return Placement(site, tuple(parts))
    if runtime is not None and is_fused_expert(module, runtime):
        return Placement(site, (Part("expert", module, "", (), "linear"),))
    return None


def _place_by_class(
    site: Site, checkpoint: Checkpoint, result: Resolution, runtime: RuntimeModel
) -> Placement | None:
    parts = []
    for leaf in ("weight", "bias"):
        entry = f"{site.module}.{leaf}"
        if entry not in runtime.shapes or (leaf == "bias" and site.direction == "in"):
            continue
        shape = runtime.shapes[entry]
        layout = runtime.layouts[site.module]
        if leaf == "weight":
            _check_length(site, shape, layout, runtime)
        part = _find_part(entry, shape, layout, checkpoint, result, runtime)
        if part is None:
            if leaf == "weight":
                return None
            result.problems.append(Refused(f"{entry} is in the model, but not in the base"))
            continue
        parts.append(part)
    return Placement(site, tuple(parts))


def _check_length(site: Site, shape: tuple[int, ...], layout: Layout, runtime: RuntimeModel) -> None:
    weight_layout(site, shape, (layout,))
    groups = runtime.groups.get(site.module, 1)
    if layout == "conv" and site.direction == "in" and len(site.vector) != shape[1] * groups:
        raise mismatch(site, shape)


def _find_part(
    entry: str,
    shape: tuple[int, ...],
    layout: Layout,
    checkpoint: Checkpoint,
    result: Resolution,
    runtime: RuntimeModel,
) -> Part | None:
    tied_to = [source for target, source in runtime.ties.items() if target == entry]
    tied_from = [target for target, source in runtime.ties.items() if source == entry]
    stored = runtime.stored.get(entry)
    if entry in runtime.converted:
        for source in runtime.converted[entry]:
            _check_dtype(entry, checkpoint.tensors[source].dtype)
        return Part("converted", entry, "", shape, layout)
    if tied_to or tied_from:
        module = entry.rpartition(".")[0]
        others = {name.rpartition(".")[0] for name in (*tied_to, *tied_from)} & set(result.adapter.sites)
        if others - {module}:
            raise Refused(
                f"modules {module} and {', '.join(sorted(others))} share {entry}, but have "
                "vectors of their own",
                hint="this architecture cannot hold two weights for them",
            )
        if tied_from and not in_output(entry, runtime):
            raise Refused(
                f"{entry} is shared with {', '.join(tied_from)}, which has no vector",
                hint="this architecture cannot hold two weights for them",
            )
        shared = stored or next((runtime.stored[s] for s in tied_to if s in runtime.stored), None)
        if shared is None:
            return None
        _check_dtype(entry, checkpoint.tensors[shared].dtype)
        result.untied.append(entry)
        return Part("direct", stored or entry, shared, shape, layout)
    if stored is None:
        return None
    _check_dtype(entry, checkpoint.tensors[stored].dtype)
    return Part("direct", stored, stored, shape, layout)


def in_output(entry: str, runtime: RuntimeModel) -> bool:
    """Whether `entry` belongs to the output embedding (the language-model head)."""
    output = runtime.output_embedding
    return output is not None and entry.rpartition(".")[0] == output.rpartition(".")[0]


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise Unsupported(
            f"the weight of {name} is stored as {dtype}, which no vector can be folded into",
            hint="give the unquantized checkpoint of the same model",
        )


def _place_extra(name: str, checkpoint: Checkpoint, result: Resolution, *, allow_unused: bool) -> None:
    """Find the stored name that the adapter's own tensor `name` replaces, or under which it is added."""
    runtime, tensor = result.runtime, result.adapter.extras[name]
    target: str | None = None
    expected: tuple[int, ...] | None = None
    if name in checkpoint.tensors:
        target, expected = name, checkpoint.tensors[name].shape
    if runtime is not None and name in runtime.shapes:
        expected = runtime.shapes[name]
        if name in runtime.converted:
            raise Refused(
                f"the adapter replaces {name}, which transformers builds from "
                f"{', '.join(runtime.converted[name])} while loading",
                hint="save the base again without that packing, or merge with PEFT",
            )
        target = _place_in_tie(name, runtime.stored.get(name, name), result, runtime)
    if target is None:
        message = (
            f"the adapter brings the tensor {name}, for which neither the base nor its class has a place"
        )
        hint = "the adapter belongs to another model; --allow-unused drops it"
        if name in result.adapter.unplaced:
            message = f"{name}: {result.adapter.unplaced_reason}"
            hint = "--allow-unused merges the vectors without the head"
        if not allow_unused:
            raise UnusedVector(message, hint=hint)
        result.warnings.append(message + "; dropped")
    elif expected != tensor.shape:
        raise ShapeMismatch(
            f"the adapter brings {name} as {list(tensor.shape)}, its place in the model is "
            f"{list(expected or ())}",
            hint="the adapter was trained on another base model, or on another size of it",
        )
    else:
        result.extras[name] = target


def _place_in_tie(name: str, target: str, result: Resolution, runtime: RuntimeModel) -> str:
    """Where a tensor that is tied to others in the class goes.

    A member of ``modules_to_save`` is a copy of its own in PEFT, so it leaves the tie, unless the copy holds
    the whole tie; any other tensor is loaded into the shared parameter and stays tied
    (``PeftModel.load_adapter``), also beside copies that leave. Two equal tensors stay tied as well.
    """
    adapter = result.adapter
    source = runtime.ties.get(name, name)
    members = [source, *(entry for entry, shared in runtime.ties.items() if shared == source)]
    if len(members) == 1:
        return target
    brought = {entry: adapter.extras[entry] for entry in members if entry in adapter.extras}
    loaded = [tensor for entry, tensor in brought.items() if _copied(entry, adapter) is None]
    if len(brought) == 1:
        stays_tied = len({_copied(entry, adapter) for entry in members}) == 1 or bool(loaded)
    else:
        stays_tied = _all_same([*brought.values()])
        if not stays_tied and _copied(name, adapter) is None and _all_same(loaded):
            result.shared[source] = adapter.extras[name]
            stays_tied = source not in brought or _copied(source, adapter) is None
    if stays_tied:
        result.shared[source] = adapter.extras[name]
        return _stored_or_tied(name, runtime)
    result.untied.append(name)
    return target


def _copied(entry: str, adapter: Adapter) -> str | None:
    return adapter.copy_of(entry.rpartition(".")[0])


def _all_same(tensors: Sequence[StoredTensor]) -> bool:
    return all(same_bytes(tensors[0], other) for other in tensors[1:])


def _stored_or_tied(entry: str, runtime: RuntimeModel) -> str:
    source = runtime.ties.get(entry, entry)
    return runtime.stored.get(entry) or runtime.stored.get(source) or source
