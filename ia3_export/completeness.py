"""What is left over, or missing, after an adapter was laid over a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ia3_export.adapters.mangled import may_be_damaged
from ia3_export.adapters.model import Adapter
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.errors import MissingVector, UnusedVector
from ia3_export.modules import stored_modules
from ia3_export.ordering import natural
from ia3_export.placement import Resolution

if TYPE_CHECKING:
    from ia3_export.model_class import RuntimeModel


def report_unused(
    adapter: Adapter, base: Checkpoint, unused: list[str], result: Resolution, *, allow_unused: bool
) -> None:
    """Vectors of modules that the base has not: a problem, or with `allow_unused` a warning."""
    if not unused:
        return
    message = (
        f"{len(unused)} of {len(adapter.sites)} vectors of {adapter.name} land on no tensor of "
        f"{base.location.given}, first: {unused[0]}"
    )
    if allow_unused and len(unused) < len(adapter.sites):
        result.warnings.append(message + "; dropped")
        return
    near = _nearest(unused[0], base.tensors)
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


def report_missing(adapter: Adapter, base: Checkpoint, result: Resolution, *, allow_missing: bool) -> None:
    """Targeted modules without a vector: a problem, or with `allow_missing` a warning."""
    runtime = result.runtime
    if runtime is None:
        missing = missing_by_name(adapter, base)
    else:
        missing = sorted(
            (
                module
                for module in runtime.layouts
                if module not in adapter.sites
                and adapter.rules.targets(module)
                # a module that the class has and the checkpoint has not (a head made anew) cannot be folded either
                and _is_stored(f"{module}.weight", runtime)
            ),
            key=natural,
        )
        # modules that exist in the file only: fused at run time, so PEFT never saw them
        absent = set(missing_by_name(adapter, base)) - set(missing)
        absent -= {runtime.stored[e].removesuffix(".weight") for e in runtime.stored if e.endswith(".weight")}
        absent = {module for module in absent if is_fused_expert(module, runtime)}
        if any(is_fused_expert(module, runtime) for module in adapter.modules):
            missing += sorted(absent, key=natural)  # trained where every expert was a module of its own
        elif absent:
            result.warnings.append(
                f"{len(absent)} stored modules match target_modules but are no modules of {runtime.class_name} "
                f"(fused at run time), first: {min(absent, key=natural)}; the adapter has no vectors for them"
            )
    if not missing:
        return
    message = f"{len(missing)} modules that {adapter.name} targets have no vector in it, first: {missing[0]}"
    if allow_missing:
        result.warnings.append(message + "; left as they are")
    else:
        result.problems.append(
            MissingVector(
                message,
                hint="the adapter file is incomplete, or belongs to another base; --allow-missing leaves those "
                "modules as they are",
            )
        )


def report_random(result: Resolution) -> None:
    """Point out what the model needs and neither base nor adapter has: transformers fills it at random."""
    if result.runtime is None:
        return
    from ia3_export.model_class import absent_entries

    absent = [entry for entry in absent_entries(result.runtime) if entry not in result.adapter.extras]
    if absent:
        result.warnings.append(
            f"{result.runtime.class_name} needs {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}, which "
            "neither the base nor the adapter holds: transformers will fill in random values"
        )


def missing_by_name(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Stored modules that the adapter's rules target and that have no vector, by their stored names."""
    return sorted(
        (
            module
            for module in stored_modules(base.tensors)
            if module not in adapter.sites and adapter.rules.targets(module)
        ),
        key=natural,
    )


def is_fused_expert(module: str, runtime: RuntimeModel) -> bool:
    """Whether the module's weight becomes a slice of a fused 3-D parameter at run time."""
    from ia3_export.conversions import state_entry

    entry, pattern = state_entry(runtime.rules, f"{module}.weight")
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
