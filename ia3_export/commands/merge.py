"""``merge``: fold IA3 adapters into a base, streaming, into a complete checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ia3_export.adapters import read_adapter
from ia3_export.adapters.model import Adapter
from ia3_export.arguments import check_arguments
from ia3_export.checkpoint import ranges
from ia3_export.checkpoint.folder import Checkpoint
from ia3_export.checkpoint.manifest import MANIFEST
from ia3_export.errors import CheckFailed, OutputError, UsageError
from ia3_export.planning.plan import Plan, make_plan
from ia3_export.planning.recipe import DEFAULT_RECIPE, Recipe
from ia3_export.quantization.base import read_base
from ia3_export.quantization.config import SIDE_FILES
from ia3_export.words import ReloadCheck
from ia3_export.writing.card import BASE_CARD, make_card
from ia3_export.writing.execute import Progress, write_outputs
from ia3_export.writing.layout import INDEX, OutputFile, lay_out, make_index
from ia3_export.writing.manifest import Manifest, make_manifest
from ia3_export.writing.options import DEFAULT_OPTIONS, OutputOptions
from ia3_export.writing.stage import check_target, copy_file, free_space, set_aside, space_hint, staged


def ignore_progress(_: Progress) -> None:
    """The default progress callback: does nothing."""


def plan_merge(
    base: str | Path, adapters: Sequence[str | Path | Adapter], recipe: Recipe = DEFAULT_RECIPE
) -> Plan:
    """What `merge` with the same arguments would do (``--dry-run``). Refusals are in ``Plan.problems``.

    Raises `IA3ExportError` for inputs that cannot be read.
    """
    check_arguments(plan_merge, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    read = [read_adapter(source) for source in adapters]
    return make_plan(read_base(base), read, recipe)


def merge(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    recipe: Recipe = DEFAULT_RECIPE,
    options: OutputOptions = DEFAULT_OPTIONS,
    *,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> Manifest:
    """Fold IA3 `adapters` into `base` and write a complete checkpoint folder.

    Every changed tensor is bit-identical to PEFT's ``merge_and_unload`` after a default ``from_pretrained``
    in the stored dtype: ``round_to_dtype(f32(W) * f32(l))``, once per adapter, in float64 for float64
    tensors; every other tensor is byte-identical to the base (Liu et al. 2022, arXiv:2205.05638; peft 0.21,
    ``tuners/ia3/layer.py``).

    Args:
        base: folder, weight file or hub id ``org/name[@revision]`` of the base model, quantized or not.
        adapters: folders, files or hub ids of IA3 adapters in any format of `READERS`, or what `read_adapter`
            returned, in the order in which they are folded.
        output: folder to create.
        recipe: how the adapters are folded.
        options: how the output is written.
        on_progress: called with bytes done and in total, from several threads, one at a time.

    Returns the manifest that was written as ``ia3_export.json``.

    Raises `IA3ExportError`: `NotFound`, `DamagedFile`, `Unsupported`, `Refused` and its kinds for inputs,
    `UsageError` for options, `OutputError` for the output, `CheckFailed` when the reload check fails. Nothing
    is left behind in any of these cases.
    """
    check_arguments(merge, locals())
    plan = plan_merge(base, adapters, recipe)
    plan.raise_problems()
    return write_merges([(plan, Path(output))], options, on_progress)[0]


def merge_each(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    directory: str | Path,
    recipe: Recipe = DEFAULT_RECIPE,
    options: OutputOptions = DEFAULT_OPTIONS,
    *,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> list[Manifest]:
    """One merged model for each adapter alone, as ``directory/<adapter name>``, reading the base once.

    Arguments and errors as in `merge`; adapters of the same name are a `UsageError`.
    """
    check_arguments(merge_each, locals())
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one --adapter")
    read = [read_adapter(source) for source in adapters]
    names = [adapter.name for adapter in read]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"several adapters are called {', '.join(sorted(twice))}",
            hint="rename their folders, or merge them apart",
        )
    whole = read_base(base)
    merges = []
    for adapter in read:
        plan = make_plan(whole, [adapter], recipe)
        plan.raise_problems()
        merges.append((plan, Path(directory) / adapter.name))
    return write_merges(merges, options, on_progress)


def write_merges(
    merges: Sequence[tuple[Plan, Path]],
    options: OutputOptions,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> list[Manifest]:
    """Carry out plans of one base, each into a folder of its own, reading the base once.

    All folders are put in place, or none. Raises `OutputError`, and `CheckFailed` when the reload
    check fails.
    """
    for plan, target in merges:
        inputs = [
            *plan.base.stored.location.inputs,
            *(path for a in plan.adapters for path in a.location.inputs),
        ]
        check_target(target, inputs, overwrite=options.overwrite)
    with ExitStack() as stack:
        outputs = []
        for plan, target in merges:
            stage = stack.enter_context(staged(target, overwrite=options.overwrite, flush=options.flush))
            outputs.append((stage, lay_out(plan, options.shard_size)))
        _check_space(outputs, merges[0][0].base.stored, options.link)
        written = write_outputs(
            outputs, link=options.link, digests=options.digests != "none", on_progress=on_progress
        )
        manifests = []
        for (plan, target), (stage, files), done in zip(merges, outputs, written, strict=True):
            _write_side_files(plan, stage, files)
            reload = (
                _reload(plan, stage, target, options.reload_check) if options.reload_check != "none" else None
            )
            manifest = make_manifest(plan, stage, target, done, options.digests, reload)
            (stage / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            manifests.append(manifest)
    return manifests


def _reload(plan: Plan, stage: Path, target: Path, how: ReloadCheck) -> Mapping[str, Any] | None:
    """Open the output of a quantized base through its users' library.

    One that is not what was written is kept aside.
    """
    if not plan.base.is_quantized:
        return None
    from ia3_export.parity.reload_check import check_output

    try:
        return check_output(stage, plan.base, dense=plan.dequantizes, whole=how == "whole").to_json()
    except CheckFailed as error:
        aside = set_aside(stage, target)
        raise CheckFailed(f"{error}; the output is kept in {aside}", hint=error.hint) from error


def _check_space(outputs: Sequence[tuple[Path, Sequence[OutputFile]]], base: Checkpoint, link: bool) -> None:
    """Refuse early when the disk is too small; a file system that clones needs next to nothing."""
    stage = outputs[0][0]
    needed = sum(file.size for _, files in outputs for file in files if not (link and file.untouched))
    free = free_space(stage)
    if needed <= free:
        return
    probe = stage / ".probe"
    cloned = ranges.clone(base.shards[0].path, probe)
    probe.unlink(missing_ok=True)
    if not cloned:
        raise OutputError(
            f"the output needs {needed:,} bytes, {stage.parent} has {free:,} free",
            hint=space_hint(stage) + (", or use --link" if not link else ""),
        )


def _write_side_files(plan: Plan, stage: Path, files: Sequence[OutputFile]) -> None:
    for relative, source in plan.companions.files.items():
        target = stage / (BASE_CARD if relative == "README.md" else relative)
        if relative in (MANIFEST, BASE_CARD) or (plan.dequantizes and relative in SIDE_FILES):
            continue
        if relative in plan.settings_files:
            _write_json(target, plan.settings_files[relative])
        else:
            copy_file(source, target)
    if plan.config is not None and not plan.base.stored.is_gguf:
        _write_json(stage / "config.json", plan.config)
    index = make_index(plan, files)
    if index is not None:
        (stage / INDEX).write_bytes(index)
    (stage / "README.md").write_text(make_card(plan), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
