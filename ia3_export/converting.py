"""``convert`` and ``combine``: an adapter in PEFT's layout, from one of another format or from several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.adapters.combine import Combine, combine_extras, combine_sites, linear_warnings
from ia3_export.adapters.model import Adapter, Site
from ia3_export.adapters.writing import write_peft
from ia3_export.checkpoint.folder import read_checkpoint
from ia3_export.checkpoint.header import StoredTensor
from ia3_export.checkpoint.stage import check_target, staged
from ia3_export.errors import Refused, UnusedVector, UsageError
from ia3_export.execute import hash_file
from ia3_export.manifest import NAME, list_files
from ia3_export.placement import Placement
from ia3_export.plan import check_weights, not_finite
from ia3_export.quantization.detection import dense_view, find_quantization
from ia3_export.resolve import resolve

SCHEMA = "ia3-export/adapter/1"


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """What `convert` and `combine` wrote. `content` is the JSON document that lies in the folder as ``ia3_export.json``."""

    folder: Path
    content: Mapping[str, Any]
    warnings: tuple[str, ...]


def convert(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    base: str | Path | None = None,
    rules: Sequence[str] = (),
    task_type: str | None = None,
    allow_unused: bool = False,
    overwrite: bool = False,
) -> WrittenAdapter:
    """Write an adapter of any format in PEFT's layout: it loads with ``PeftModel.from_pretrained`` and has the same forward.

    Args:
        adapter: folder, file or hub id, in any format of `READERS`.
        output: folder to create.
        base: the model that it belongs to. Names and shapes are then checked against it, names that old versions of PEFT
            damaged are restored, and bare vectors of convolutions get their shape.
        rules: ``REGEX=output|input`` for a file of no known format (`read_mapped`).
        task_type: PEFT's, such as ``SEQ_2_SEQ_LM``, for the configuration; default what the adapter says, if anything.
        allow_unused: leave out what has no place in the base, or in any class of transformers.
        overwrite: replace an existing output folder.

    Raises `Refused` where a module has vectors on both sides: PEFT's layer takes its side for all its adapters, so not even
    two adapters can hold them (`merge` folds both). Other `IA3ExportError`; nothing is left behind then.
    """
    read = read_adapter(adapter, rules=rules)
    warnings: Iterable[str] = read.warnings
    _check_finite([read])
    sites, warnings = list(read.sites.values()), list(read.warnings)
    if base is not None:
        checkpoint = read_checkpoint(base)
        found = resolve(
            read, dense_view(checkpoint, find_quantization(checkpoint)), allow_unused=allow_unused
        )
        if found.problems:
            raise found.problems[0]
        warnings, sites = found.warnings, [_shaped(placement) for placement in found.placements.values()]
        read = replace(found.adapter, extras={name: found.adapter.extras[name] for name in found.extras})
    elif read.format == "peft" and "peft_version" not in read.config:
        warnings.append(
            "PEFT below 0.18 may have written it, which damaged module paths that the adapter's name occurs in; --base checks them"
        )
    elif read.format == "adapterhub":
        read = _without_own_head(read, allow_unused=allow_unused)
    return _write([read], sites, read.extras, Path(output), warnings, "convert", {}, task_type, overwrite)


def _without_own_head(adapter: Adapter, *, allow_unused: bool) -> Adapter:
    own = [name for name in adapter.extras if name.startswith("heads.")]
    if own and not allow_unused:
        raise UnusedVector(
            f"{adapter.name}: {adapter.warnings[0] if adapter.warnings else own[0]}",
            hint="--allow-unused converts the vectors without the head",
        )
    return replace(adapter, extras={n: t for n, t in adapter.extras.items() if n not in own})


def combine(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    how: Combine | None = None,
    weights: Sequence[float] = (),
    overwrite: bool = False,
) -> WrittenAdapter:
    """Write one adapter, in PEFT's layout, that acts as several do together.

    Args:
        adapters: at least two folders, files or hub ids, in any format of `READERS`.
        output: folder to create.
        how: ``product`` multiplies the vectors, as folding one after the other does but rounded once; ``linear`` is PEFT's
            ``IA3Model.add_weighted_adapter``, ``sum w l`` with its bits in float32, in which a missing vector counts as zeros;
            ``delta`` is ``1 + sum w (l - 1)``. By default ``linear`` with `weights`, ``product`` without.
        weights: one number an adapter, for ``linear`` and ``delta``.
        overwrite: replace an existing output folder.

    Heads and other tensors besides the vectors are kept where at most one adapter brings them, or all bring the same.

    Raises `UsageError`, `Refused` (different sides of a module, different heads), `ShapeMismatch` and what reading raises.
    """
    read = [read_adapter(source) for source in adapters]
    if len(read) < 2:
        raise UsageError(
            "combine needs at least two adapters", hint="repeat --adapter; convert rewrites a single one"
        )
    how = how or ("linear" if weights else "product")
    check_weights(read, how, weights)
    _check_finite(read)
    warnings = [warning for adapter in read for warning in adapter.warnings]
    if how == "linear":
        warnings += linear_warnings(read, weights)
    sites = combine_sites(read, weights, how)
    options = {"combine": how, "weights": list(weights)}
    return _write(
        read, list(sites.values()), combine_extras(read), Path(output), warnings, "combine", options, None, overwrite
    )  # fmt: skip


def _write(
    adapters: Sequence[Adapter],
    sites: Sequence[Site],
    extras: Mapping[str, StoredTensor],
    target: Path,
    warnings: Sequence[str],
    command: str,
    options: Mapping[str, Any],
    task_type: str | None,
    overwrite: bool,
) -> WrittenAdapter:
    check_target(target, [adapter.location.path for adapter in adapters], overwrite=overwrite)
    twice = sorted(module for module, count in Counter(site.module for site in sites).items() if count > 1)
    if twice:
        raise Refused(
            f"{len(twice)} modules have vectors on both sides, first {twice[0]}; PEFT's layers have one side, also for several adapters",
            hint="merge folds both into the weights; there is no PEFT adapter for it",
        )
    with staged(target, overwrite=overwrite) as stage:
        write_peft(
            stage, sites, extras,
            task_type=task_type or _agreed(a.task_type for a in adapters),
            base_model=_agreed(a.config.get("base_model_name_or_path") for a in adapters),
            to_save={name for adapter in adapters for name in adapter.rules.to_save},
        )  # fmt: skip
        content = {
            "schema": SCHEMA,
            "command": command,
            "tool": {"name": "ia3-export", "version": metadata.version("ia3-export")},
            "options": dict(options),
            "sources": [
                {
                    "name": a.name, "format": a.format, "id": a.location.hub_id or a.location.path.resolve().name,
                    "revision": a.location.revision, "vectors": len(a.sites), "parameters": a.parameters,
                    "files": {name: hash_file(a.folder / name) for name in a.files},
                }
                for a in adapters
            ],
            "vectors": len(sites),
            "parameters": sum(len(site.vector) for site in sites),
            "warnings": list(warnings),
            "files": list_files(stage, known={}, hashed=True),
        }  # fmt: skip
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (stage / NAME).write_text(text, encoding="utf-8")
    return WrittenAdapter(target, content, tuple(warnings))


def _check_finite(adapters: Sequence[Adapter]) -> None:
    for problem in (p for adapter in adapters for p in not_finite(adapter)):
        raise problem


def _shaped(placement: Placement) -> Site:
    """The site with the shape that PEFT gives to vectors of its kind of module."""
    site, part = placement.site, placement.parts[0]
    if len(site.shape) > 1 or part.layout != "conv":
        return site
    return replace(site, shape=(1, len(site.vector), *(1,) * (len(part.shape) - 2)))


def _agreed(values: Iterable[str | None]) -> str | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None
