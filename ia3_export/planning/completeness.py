"""What is left over, or missing, after an adapter was laid over a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ia3_export.adapters.mangled import may_be_damaged
from ia3_export.adapters.model import Adapter, same_in_every_layer
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import MissingVector, Refused, UnusedVector
from ia3_export.fold import FLOAT_DTYPES
from ia3_export.models.modules import stored_modules
from ia3_export.ordering import enclosing, natural
from ia3_export.planning.placement import Resolution

if TYPE_CHECKING:
    from ia3_export.models.model_class import RuntimeModel


#: Stored modules that are never meant by ``all-linear``: the embedding and the output layer, by
#: their usual names.
_NOT_LINEAR = ("embed_tokens", "lm_head")


def check_unused(
    adapter: Adapter, checkpoint: Checkpoint, unused: list[str], result: Resolution, *, allow_unused: bool
) -> None:
    """Vectors of modules that the base has not: a problem, or with `allow_unused` a warning."""
    if not unused:
        return
    message = (
        f"{len(unused)} of {len(adapter.sites)} vectors of {adapter.name} land on no tensor of "
        f"{checkpoint.location.given}, first: {unused[0]}"
    )
    if allow_unused and len(unused) < len(adapter.sites):
        result.warnings.append(message + "; dropped")
        return
    near = _nearest(unused[0], checkpoint.tensors)
    result.problems.append(
        UnusedVector(
            message,
            hint="the adapter was trained on another model, or its keys have another prefix"
            + (f" (the base has {near})" if near else "")
            + ("; --allow-unused drops them" if len(unused) < len(adapter.sites) else "")
            + (
                "; if PEFT damaged them, its folder must have the adapter's name"
                if may_be_damaged(adapter)
                else ""
            ),
        )
    )


def check_missing(
    adapter: Adapter, checkpoint: Checkpoint, result: Resolution, *, allow_missing: bool
) -> None:
    """Targeted modules without a vector: a problem, or with `allow_missing` a warning."""
    runtime = result.runtime
    rules = adapter.rules
    modules = {*stored_modules(checkpoint.tensors), *(runtime.layouts if runtime is not None else ())}
    if not any(map(rules.targets, modules)) or (runtime is None and rules.is_all_linear):
        # the configuration cannot say what is missing, the other layers can
        adapter = replace(adapter, rules=replace(rules, target=same_in_every_layer(adapter.modules)))
    if runtime is None:
        missing = missing_by_name(adapter, checkpoint)
    else:
        output = _left_out_of_all_linear(adapter, runtime) if rules.is_all_linear else None
        missing = sorted(
            (
                module
                for module, layout in runtime.layouts.items()
                if module not in adapter.sites
                and adapter.rules.targets(module)
                and (not rules.is_all_linear or (layout != "conv" and module != output))
                # a module that the class has and the checkpoint has not (a head made anew) cannot
                # be folded either
                and _is_stored(f"{module}.weight", runtime)
            ),
            key=natural,
        )
        # modules that exist in the file only: fused at run time, so PEFT never saw them
        absent = set(missing_by_name(adapter, checkpoint)) - set(missing)
        absent -= {runtime.stored[e].removesuffix(".weight") for e in runtime.stored if e.endswith(".weight")}
        absent = {module for module in absent if is_fused_expert(module, runtime)}
        if any(is_fused_expert(module, runtime) for module in adapter.modules):
            missing += sorted(absent, key=natural)  # trained where every expert was a module of its own
        elif absent:
            result.warnings.append(
                f"{len(absent)} stored modules match target_modules but are no modules of "
                f"{runtime.class_name} (fused at run time), first: {min(absent, key=natural)}; the adapter "
                "has no vectors for them"
            )
    if not missing:
        return
    message = f"{len(missing)} modules that {adapter.name} targets have no vector in it, first: {missing[0]}"
    hint = (
        "the adapter file is incomplete, or belongs to another base; --allow-missing leaves "
        "those modules as they are"
    )
    _report(result, message, hint, allowed=allow_missing)


def _report(result: Resolution, message: str, hint: str, *, allowed: bool) -> None:
    """What an adapter should have and has not: a problem, or if it is `allowed` a warning."""
    if allowed:
        result.warnings.append(message + "; left as they are")
    else:
        result.problems.append(MissingVector(message, hint=hint))


def check_lost(adapter: Adapter, checkpoint: Checkpoint, result: Resolution, *, allow_missing: bool) -> None:
    """Modules that were trained whole (heads) and of which the file lacks a tensor: a problem, or a warning.

    A warning with `allow_missing`. What neither class nor base has does not count.
    """
    if not adapter.copied and adapter.format != "adapterhub":
        return
    runtime, stored, ties = result.runtime, {name: name for name in checkpoint.tensors}, dict[str, str]()
    if runtime is None:
        entries = {name for name, tensor in checkpoint.tensors.items() if tensor.dtype in FLOAT_DTYPES}
    else:
        stored, ties = dict(runtime.stored), dict(runtime.ties)
        entries = set(runtime.parameters)
    whole: dict[str, list[str]] = {}
    for entry in sorted(entries):
        module = _trained_whole(adapter, entry)
        if module is not None:
            whole.setdefault(module, []).append(entry)
    landed = set(result.extras.values())
    for module, parts in whole.items():
        _check_nesting(module, parts, result)
        there = {entry for entry in parts if entry in adapter.extras or stored.get(entry) in landed}
        shared = {ties.get(entry, entry) for entry in there}
        lost = [entry for entry in parts if entry not in there and ties.get(entry, entry) not in shared]
        if runtime is not None and adapter.format != "peft":
            # AdapterHub's heads share the embedding of the body, which is not trained
            lost = [e for e in lost if ties.get(e, "").rpartition(".")[0] not in runtime.embeddings]
        if lost:
            _check_lost(module, lost, len(parts), result, allow_missing=allow_missing)


def _check_nesting(module: str, parts: list[str], result: Resolution) -> None:
    """``modules_to_save`` that match a module and others in it (``embeddings`` and ``word_embeddings``).

    PEFT saves the copies of the inner ones, which its forward never reads, and its loader refuses the file.
    """
    adapter = result.adapter
    if adapter.format != "peft":
        return
    inner = next((copy for part in parts if (copy := adapter.inner_copy(module, part)) is not None), None)
    if inner is not None:
        result.problems.append(
            Refused(
                f"modules_to_save of {adapter.name} match {module} and, in it, {inner}: what PEFT saves of "
                "that is not what was trained",
                hint=f"train again with modules_to_save that match one of them only, such as {module}",
            )
        )


def _check_lost(module: str, lost: list[str], count: int, result: Resolution, *, allow_missing: bool) -> None:
    adapter = result.adapter
    declared = f"{module} (modules_to_save)" if adapter.format == "peft" else module
    message = (
        f"{adapter.name} was trained with {declared} of its own, but of its {count} tensors {len(lost)} are "
        f"not in {adapter.location.given}, first: {lost[0]}"
    )
    hint = (
        "the adapter file is incomplete: save it again from the training run; --allow-missing leaves the "
        "base's tensors"
    )
    _report(result, message, hint, allowed=allow_missing)


def heads_in_question(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    """Whether a module was trained whole that neither base nor adapter holds, and only the class knows."""
    if not adapter.copied:
        return False
    modules = {name.rpartition(".")[0] for name in (*checkpoint.tensors, *adapter.extras)}
    return bool(adapter.without_module({outer for module in modules for outer in enclosing(module)}))


def _trained_whole(adapter: Adapter, entry: str) -> str | None:
    """The module that PEFT's adapter holds a copy of, or whose tensors another library's head consists of."""
    module = entry.rpartition(".")[0]
    if adapter.format != "adapterhub":
        return adapter.copy_of(module)
    brought = {name.rpartition(".")[0] for name in adapter.extras.keys() - adapter.unplaced}
    body = {name.split(".")[0] for name in adapter.modules}
    head, heads = module.split(".")[0], {name.split(".")[0] for name in brought} - body
    return head if head in heads else module if module in brought else None


def _left_out_of_all_linear(adapter: Adapter, runtime: RuntimeModel) -> str | None:
    """The output embedding or a classifier's head, which PEFT's ``all-linear`` spares."""
    if runtime.output_embedding is not None:
        return runtime.output_embedding.rpartition(".")[0]
    heads = ("score", "classifier") if adapter.task_type == "SEQ_CLS" else ()
    return next((name for name in heads if name in runtime.modules), None)


def check_random(result: Resolution) -> None:
    """Point out what the model needs and neither base nor adapter has: transformers fills it at random."""
    if result.runtime is None:
        return
    from ia3_export.models.model_class import absent_entries

    absent = [entry for entry in absent_entries(result.runtime) if entry not in result.adapter.extras]
    if absent:
        result.warnings.append(
            f"{result.runtime.class_name} needs "
            f"{', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}, which neither the base nor the "
            "adapter holds: transformers will fill in random values"
        )


def missing_by_name(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """Stored modules that the adapter's rules target and that have no vector, by their stored names."""
    spared = _NOT_LINEAR if adapter.rules.is_all_linear else ()
    return sorted(
        (
            module
            for module in stored_modules(checkpoint.tensors)
            if module not in adapter.sites
            and adapter.rules.targets(module)
            and module.rpartition(".")[2] not in spared
        ),
        key=natural,
    )


def is_fused_expert(module: str, runtime: RuntimeModel) -> bool:
    """Whether the module's weight becomes a slice of a fused 3-D parameter at run time."""
    if module in runtime.modules:
        return False
    from ia3_export.models.conversions import state_entry

    entry, pattern = state_entry(runtime.loading, f"{module}.weight")
    return pattern is not None and len(runtime.shapes.get(entry, ())) == 3


def _nearest(module: str, tensors: Mapping[str, Any]) -> str | None:
    parts = module.split(".")
    for start in range(1, len(parts)):
        tail = ".".join(parts[start:]) + ".weight"
        for name in tensors:
            if name == tail or name.endswith("." + tail):
                return str(name)
    return None


def _is_stored(entry: str, runtime: RuntimeModel) -> bool:
    return entry in runtime.stored or entry in runtime.converted or entry in runtime.ties
