"""``convert`` and ``combine``: an adapter in PEFT's layout, from one of another format or from several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import combine_extras, combine_sites, linear_warnings
from ia3_export.adapters.mangled import may_be_damaged
from ia3_export.adapters.model import Adapter, Site, TargetRules, second_key
from ia3_export.adapters.writing import ConfigFacts, write_peft
from ia3_export.arguments import check_arguments, real
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.checkpoint.ranges import hash_file
from ia3_export.errors import Refused, UnusedVector, UsageError
from ia3_export.planning.placement import Placement
from ia3_export.planning.plan import check_weights, not_finite
from ia3_export.planning.resolve import resolve
from ia3_export.quantization.base import Base, read_base
from ia3_export.words import Combine, TaskType
from ia3_export.writing.manifest import Manifest, list_files, tool
from ia3_export.writing.stage import check_target, staged

SCHEMA = "ia3-export/adapter/1"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """What `convert` and `combine` wrote.

    `content` is the JSON document that lies in the folder as ``ia3_export.json``.
    """

    folder: Path
    content: Mapping[str, Any]
    warnings: tuple[str, ...]


def convert(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    base: str | Path | None = None,
    task_type: TaskType | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    overwrite: bool = False,
) -> WrittenAdapter:
    """Write an adapter of any format in PEFT's layout.

    It loads with ``PeftModel.from_pretrained`` and has the same forward.

    Args:
        adapter: folder, file or hub id in any format of `READERS`, or what `read_adapter` returned.
        output: folder to create.
        base: the model that it belongs to. Names and shapes are then checked against it, names that old
            versions of PEFT damaged are restored, and bare vectors of convolutions get their shape.
        task_type: PEFT's, such as ``SEQ_2_SEQ_LM``, for the configuration; default what the
            adapter says, if anything.
        allow_missing: accept targeted modules of the base without a vector.
        allow_unused: leave out what has no place in the base, or in any class of transformers.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.

    Raises `Refused` where a module has vectors on both sides: PEFT's layer takes its side for all its
    adapters, so not even two adapters can hold them (`merge` folds both). Other `IA3ExportError`; nothing is
    left behind then.
    """
    check_arguments(convert, locals())
    whole = read_base(base) if base is not None else None
    read, warnings = _fit(
        read_adapter(adapter), whole, allow_missing=allow_missing, allow_unused=allow_unused
    )
    if task_type is not None and not _has_head(task_type, read.extras):
        raise UsageError(
            f"--task-type {task_type}, and {read.name} brings no classifier, without which PEFT does not "
            "load such an adapter",
            hint="leave it out; the task of the base's own head counts then",
        )
    # with a base it is known to be complete, or allowed not to be; without one the rules must
    # stay what they are
    rules = None if base is not None or read.rules.exclude is not None else read.rules
    if rules is not None and read.format != "peft":
        rules = TargetRules(target=rules.target, feedforward=None)
    draft = _Draft(
        command="convert",
        adapters=[read],
        sites=list(read.sites.values()),
        warnings=warnings,
        rules=rules,
        task_type=task_type,
    )
    return _write(draft, Path(output), whole, overwrite=overwrite)


def combine(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    combine: Combine | None = None,
    weights: Sequence[float] = (),
    base: str | Path | None = None,
    overwrite: bool = False,
) -> WrittenAdapter:
    """Write one adapter, in PEFT's layout, that acts as several do together.

    Args:
        adapters: at least two folders, files or hub ids, in any format of `READERS`.
        output: folder to create.
        combine: ``product`` multiplies the vectors, as folding one after the other does but rounded once;
            ``linear`` is PEFT's ``IA3Model.add_weighted_adapter``, ``sum w l`` with its bits in float32, in
            which a missing vector counts as zeros; ``delta`` is ``1 + sum w (l - 1)``. By default ``linear``
            with `weights`, ``product`` without.
        weights: one number an adapter, for ``linear`` and ``delta``.
        base: as in `convert`.
        overwrite: replace an output folder that a command of ours wrote, and in which nothing else lies.

    Heads and other tensors besides the vectors are kept where at most one adapter brings them, or all bring
    the same.

    Raises `UsageError`, `Refused` (different sides of a module, different heads), `ShapeMismatch`,
    `NotFinite` and what reading raises.
    """
    check_arguments(globals()["combine"], locals())  # its own name is also an option
    weights = real(weights)
    read = [read_adapter(source) for source in adapters]
    if len(read) < 2:
        raise UsageError(
            "combine needs at least two adapters", hint="repeat --adapter; convert rewrites a single one"
        )
    how = combine or ("linear" if weights else "product")
    check_weights(read, how, weights)
    whole = read_base(base) if base is not None else None
    fitted = [_fit(adapter, whole) for adapter in read]
    read = [adapter for adapter, _ in fitted]
    warnings = [warning for _, said in fitted for warning in said]
    if how == "linear":
        warnings += linear_warnings(read, weights)
    sites = combine_sites(read, weights, how)
    options = {"combine": how, "weights": list(weights)}
    draft = _Draft(
        command="combine", adapters=read, sites=list(sites.values()), warnings=warnings, options=options
    )
    return _write(draft, Path(output), whole, overwrite=overwrite)


def _fit(
    adapter: Adapter, base: Base | None, *, allow_missing: bool = False, allow_unused: bool = False
) -> tuple[Adapter, list[str]]:
    """`adapter` with its names and shapes in `base`, if there is one, and what a user should know."""
    for problem in not_finite(adapter):
        raise problem
    if base is not None:
        found = resolve(adapter, base.dense, allow_missing=allow_missing, allow_unused=allow_unused)
        for problem in found.problems:
            raise problem
        extras = {name: found.adapter.extras[name] for name in found.extras}
        sites: dict[str, Site] = {}
        for placement in found.placements.values():
            site = _shaped(placement)
            if not extras:  # with a head, the class that has it says the paths
                site = _as_stored(site, placement)
            sites[site.module if site.module not in sites else second_key(site.module, site.direction)] = site
        return replace(found.adapter, sites=sites, extras=extras), found.warnings
    warnings = list(adapter.warnings)
    if may_be_damaged(adapter):
        warnings.append(
            f"PEFT below 0.18 may have written {adapter.name}: it damaged module paths that the adapter's "
            "name occurs in; --base checks and restores them"
        )
    if adapter.unplaced and not allow_unused:
        raise UnusedVector(
            f"{adapter.name}: {adapter.unplaced_reason}",
            hint="--allow-unused converts the vectors without the head",
        )
    extras = {name: tensor for name, tensor in adapter.extras.items() if name not in adapter.unplaced}
    return replace(adapter, extras=extras), warnings


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Draft:
    """An adapter that is to be written.

    The `command` that makes it (with these `options`) of `adapters`, its vectors, and what PEFT's
    configuration shall say where the adapters do not.
    """

    command: str
    adapters: Sequence[Adapter]
    sites: Sequence[Site]
    warnings: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    rules: TargetRules | None = None
    task_type: str | None = None


def _write(draft: _Draft, target: Path, base: Base | None, *, overwrite: bool) -> WrittenAdapter:
    adapters, sites = draft.adapters, draft.sites
    inputs = [path for adapter in adapters for path in adapter.location.inputs]
    inputs += base.stored.location.inputs if base is not None else []
    check_target(target, inputs, overwrite=overwrite)
    twice = sorted(module for module, count in Counter(site.module for site in sites).items() if count > 1)
    if twice:
        raise Refused(
            f"{len(twice)} modules have vectors on both sides, first {twice[0]}; PEFT's layers have one "
            "side, also for several adapters",
            hint="merge folds both into the weights; there is no PEFT adapter for it",
        )
    extras, said = combine_extras(adapters), _agreed(a.task_type for a in adapters)
    # the head of another format may have been left out
    kept = _has_head(said, extras) or all(a.format == "peft" for a in adapters)
    with staged(target, overwrite=overwrite) as stage:
        facts = ConfigFacts(
            task_type=draft.task_type or (said if kept else None),
            base_model=_agreed(a.config.get("base_model_name_or_path") for a in adapters),
            class_name=_agreed(a.class_name for a in adapters),
            to_save={name for adapter in adapters for name in adapter.rules.to_save},
        )
        write_peft(stage, sites, extras, draft.rules, facts)
        content = {
            "schema": SCHEMA,
            "command": draft.command,
            "tool": tool(),
            "options": dict(draft.options),
            "sources": [
                {
                    "name": a.name,
                    "format": a.format,
                    "id": a.location.name,
                    "revision": a.location.revision,
                    "vectors": len(a.sites),
                    "parameters": a.parameters,
                    "files": {name: hash_file(a.folder / name) for name in a.files},
                }
                for a in adapters
            ],
            "names_checked": base is not None,
            "labels": list(_agreed(a.labels or None for a in adapters) or ()),
            "problem_type": _agreed(a.config.get("problem_type") for a in adapters),
            "vectors": len(sites),
            "parameters": sum(len(site.vector) for site in sites),
            "warnings": list(draft.warnings),
            "files": list_files(stage, known={}, hashed=True),
        }
        (stage / MANIFEST).write_text(Manifest(target, content).to_json(), encoding="utf-8")
    return WrittenAdapter(target, content, tuple(draft.warnings))


def _has_head(task_type: str | None, extras: Collection[str]) -> bool:
    """Whether the adapter brings what PEFT asks of one for this task."""
    heads = ("classifier.", "score.", "classification_head.")
    return task_type not in ("SEQ_CLS", "TOKEN_CLS") or any(name.startswith(heads) for name in extras)


def _shaped(placement: Placement) -> Site:
    """The site with the shape that PEFT gives to vectors of its kind of module."""
    site, part = placement.site, placement.parts[0]
    if len(site.shape) > 1 or part.layout != "conv":
        return site
    return replace(site, shape=(1, len(site.vector), *(1,) * (len(part.shape) - 2)))


def _as_stored(site: Site, placement: Placement) -> Site:
    """The site under the path of the base's own class, if that has another prefix than the class trained."""
    part = placement.parts[0]
    stored = part.source.removesuffix(".weight")
    other_prefix = stored.endswith(f".{site.module}") or site.module.endswith(f".{stored}")
    return replace(site, module=stored) if part.kind == "direct" and other_prefix else site


def _agreed(values: Iterable[T | None]) -> T | None:
    found = set(values) - {None}
    return found.pop() if len(found) == 1 else None
